// The table of completions: a row stays if each word of the search stands somewhere in it; data-* are what it sorts by.
function matches(text, search) {
  return search.toLowerCase().split(/\s+/).every(word => text.includes(word));
}
function compare(order) {  // "-tokens": largest first, rows without the number last
  const sign = order[0] === "-" ? -1 : 1, name = order.replace("-", "");
  return (a, b) => a[name] === undefined || b[name] === undefined
    ? (a[name] === undefined) - (b[name] === undefined) : sign * (a[name] - b[name]);
}
for (const box of document.querySelectorAll(".completions")) {
  const [search, order] = box.querySelectorAll("input, select"), body = box.querySelector("tbody");
  const rows = [...body.rows].map(row => ({row, text: row.textContent.toLowerCase()}));
  const show = () => {
    let count = 0;
    for (const {row, text} of rows) count += !(row.hidden = !matches(text, search.value));
    box.querySelector("output").textContent = `${count} of ${rows.length}`;
  };
  search.oninput = show;
  order.onchange = () => {
    const by = compare(order.value);
    body.append(...rows.map(({row}) => row).sort((a, b) => by(a.dataset, b.dataset)));
  };
  const form = box.querySelector("form");
  form.onsubmit = () => false;  // Enter would load the page again
  form.hidden = false;
  show();
}
