"""The page in a headless Chromium: a question, its answer while it comes, and what an answer must not do."""

import asyncio
import contextlib
import json
import re
import time

import pytest
from serve import chromium
from serve.fake import FakeAsker, fake_app
from serve.live import live

from deepseek_jax.serve.guard import Guard
from deepseek_jax.serve.page import PAGE, page_headers

pytestmark = pytest.mark.skipif(chromium.BINARY is None, reason="no chromium, chromium-browser or google-chrome here")

ANSWER = """<think>
Use the formula with $a=1$.
</think>

The roots of $x^2 - 5x + 6 = 0$ are **3** and **2**:

```python
roots(1, -5, 6) < 4
```

\\[ x = \\frac{5 \\pm \\sqrt{1}}{2} \\]
"""
HOSTILE = """<script>window.broken = 1</script> <img src=x onerror="window.broken = 2"> [a](javascript:window.broken=3)
[b](data:text/html,x) ![c](http://elsewhere.invalid/c.png) <b onclick="window.broken=4">d</b>

`<img src=x onerror="window.broken = 5">` $<img src=x onerror="window.broken = 6">$
"""


@pytest.fixture(scope="module")
def browser():
    page = chromium.Page()
    yield page
    page.close()


def ask(page: chromium.Page, question: str) -> None:
    page.evaluate(f"$('question').value = {json.dumps(question)}; $('ask-form').requestSubmit()")


def answered(page: chromium.Page) -> None:
    page.wait("document.querySelector('.note') !== null && running === null && $('stop').hidden")


class Gated(FakeAsker):
    """Says ``allowed`` tokens, and waits to be allowed more."""

    allowed = 0

    async def submit(self, ids, sampling, draw):
        made = 0
        async with contextlib.aclosing(super().submit(ids, sampling, draw)) as events:
            async for event in events:
                yield event
                made += len(event.ids)
                while made >= self.allowed:
                    await asyncio.sleep(0.01)


def test_a_question_and_a_streamed_answer(browser, tmp_path):
    asker = Gated(ANSWER)
    with live(Guard(fake_app(asker))) as port:
        browser.events.clear()
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait("document.title === 'fake'")
        ask(browser, "What are the roots?")
        asker.allowed = 10
        browser.wait("/Thinking/.test(document.querySelector('summary').textContent)")
        asker.allowed = len(asker.tokenizer.encode(ANSWER.partition("2**")[0] + "2**:", allow_special=True))
        browser.wait("document.querySelector('.text strong') !== null && running !== null")
        asker.allowed = 1000
        answered(browser)
        thinking, text = "document.querySelector('details.thinking')", "document.querySelector('.text')"
        assert browser.evaluate(f"!{thinking}.hidden && !{thinking}.open")
        assert re.fullmatch(
            r"Thought for [\d.]+ s", browser.evaluate(f"{thinking}.querySelector('summary').textContent")
        )
        browser.evaluate(f"{thinking}.open = true")
        browser.wait(f"{thinking}.textContent.includes('Use the formula') && {thinking}.querySelector('math') !== null")
        note = browser.evaluate("document.querySelector('.note').textContent")
        assert re.fullmatch(rf"{len(asker.answer)} tokens · [\d.]+ tokens/s", note)
        assert browser.evaluate(f"{text}.querySelector('pre').textContent") == "roots(1, -5, 6) < 4"
        assert browser.evaluate(f"{text}.querySelectorAll('math').length") == 2
        assert browser.evaluate(f"{text}.querySelectorAll('math[display=block] mfrac msqrt').length") == 1
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 10_000
        ask(browser, "And?")
        answered(browser)
        browser.wait("said.length === 4")
        written = asker.tokenizer.decode(asker.asked[1][0], skip_special_tokens=False)
        assert "are **3** and **2**" in written and "Use the formula" not in written
        assert {url.partition(f":{port}")[0] for url in browser.requests()} == {"http://127.0.0.1"}
        assert browser.complaints() == []


def test_an_answer_does_nothing(browser):
    with live(Guard(fake_app(FakeAsker(HOSTILE, at_once=50)))) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait("document.title === 'fake'")
        browser.events.clear()
        ask(browser, HOSTILE)
        answered(browser)
        assert (
            browser.evaluate("$('talk').querySelectorAll('img, script, b, iframe, [onclick], [onerror]').length") == 0
        )
        assert browser.evaluate("[...$('talk').querySelectorAll('a')].map((a) => a.href)") == [
            "http://elsewhere.invalid/c.png"
        ]
        assert browser.evaluate("$('talk').textContent.includes('<script>window.broken = 1</script>')")
        assert browser.evaluate("window.broken ?? 0") == 0
        assert len(browser.requests()) == 1 and browser.complaints() == []


def test_a_key_is_asked_for(browser):
    with live(Guard(fake_app(), keys=("sk-page",))) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait("!$('key-form').hidden && $('ask-form').hidden")
        browser.wait("$('key').placeholder.includes('asks for an API key')")
        for key, then in (
            ("sk-wrong", "$('key').placeholder.includes('none of')"),
            ("sk-page", "$('key-form').hidden"),
        ):
            browser.evaluate(f"$('key').value = '{key}'; $('key-form').requestSubmit()")
            browser.wait(then)
        browser.wait("!$('ask-form').hidden")
        ask(browser, "12+34?")
        browser.wait("document.querySelector('.text')?.textContent.includes('12+34=46')")


def test_stopping(browser):
    asker = FakeAsker("and so on " * 100, seconds=0.05)
    with live(Guard(fake_app(asker))) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait("document.title === 'fake'")
        ask(browser, "Go on")
        browser.wait("document.querySelector('.text')?.textContent.includes('and')")
        browser.evaluate("$('stop').click()")
        answered(browser)
        browser.wait("document.querySelector('.note').textContent.endsWith('· stopped')")
        browser.wait("$('send').hidden === false")
        last = time.monotonic() + 60
        while asker.open:  # the server is told by the connection's end
            assert time.monotonic() < last
            time.sleep(0.05)
        assert asker.cancelled == 1


def test_on_a_phone(browser):
    wide = (
        "A" * 300
        + "\n\n```\n"
        + "b" * 300
        + "\n```\n\n| a | b |\n|---|---|\n"
        + f"| {'c ' * 200} | d |\n\n$$"
        + "x+" * 99
        + "y$$"
    )
    with live(Guard(fake_app(FakeAsker(wide, at_once=50)))) as port:
        shape = {"width": 360, "height": 640, "deviceScaleFactor": 2, "mobile": True}
        browser.call("Emulation.setDeviceMetricsOverride", **shape)
        browser.open(f"http://127.0.0.1:{port}/")
        browser.wait("document.title === 'fake'")
        ask(browser, "w" * 200)
        answered(browser)
        assert browser.evaluate("document.documentElement.scrollWidth") <= 360
        assert browser.evaluate("$('talk').scrollWidth <= $('talk').clientWidth")
        assert browser.evaluate("$('question').getBoundingClientRect().bottom") <= 640


MARKDOWN = [
    ("a *b* __c__ ~~d~~ `e *f*` \\*g\\*", "<p>a <em>b</em> <strong>c</strong> <del>d</del> <code>e *f*</code> *g*</p>"),
    ("***a*** snake_case_name 2*3*4", "<p><strong><em>a</em></strong> snake_case_name 2<em>3</em>4</p>"),
    ("one\ntwo", "<p>one<br>two</p>"),
    ("# A *b*\ntext", "<h1>A <em>b</em></h1><p>text</p>"),
    ("> a\n> - b\n\n---", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><hr>"),
    ("- a\n  - b\n  - c\n- d", "<ul><li>a<ul><li>b</li><li>c</li></ul></li><li>d</li></ul>"),
    ("3. a\n\n   b\n4. c", '<ol start="3"><li><p>a</p><p>b</p></li><li>c</li></ol>'),
    ("1. a\n   ```\n   b\n   ```\n2. c", '<ol start="1"><li>a<pre>b</pre></li><li>c</li></ol>'),
    ("text:\n- a\n- b", "<p>text:</p><ul><li>a</li><li>b</li></ul>"),
    ("```\n# no *b*\n", "<pre># no *b*</pre>"),
    ("| a | b |\n|:--|--:|\n| `c` | d\\|e |", "<table>a,b;<code>c</code>,d|e</table>"),
    ("https://a.b/c. costs $5 and $6", '<p><a href="https://a.b/c">https://a.b/c</a>. costs $5 and $6</p>'),
    ("[a](https://b.c/?d=e)", '<p><a href="https://b.c/?d=e">a</a></p>'),
    ("<b>&amp;", "<p>&lt;b&gt;&amp;amp;</p>"),
    ("an open **end and \\( x", "<p>an open **end and ( x</p>"),
]
TEX = [
    ("x^2_i", "<msubsup><mi>x</mi><mi>i</mi><mn>2</mn></msubsup>"),
    ("x^12", "<msup><mi>x</mi><mn>1</mn></msup><mn>2</mn>"),
    ("f'(x)", "<msup><mi>f</mi><mrow><mo>′</mo></mrow></msup><mo>(</mo><mi>x</mi><mo>)</mo>"),
    ("\\frac12", "<mfrac><mn>1</mn><mn>2</mn></mfrac>"),
    ("\\sqrt[3]{2}", "<mroot><mn>2</mn><mn>3</mn></mroot>"),
    (
        "\\sum_{i=1}^n i",
        "<munderover><mo>∑</mo><mrow><mi>i</mi><mo>=</mo><mn>1</mn></mrow><mi>n</mi></munderover><mi>i</mi>",
    ),
    ("\\left(a\\right.", "<mrow><mo>(</mo><mi>a</mi><mo></mo></mrow>"),
    ("\\mathbb{R}\\mathcal{L}\\mathbf{v}", "<mi>ℝ</mi><mi>ℒ</mi><mi>𝐯</mi>"),
    ("\\text{if } a_1", "<mtext>if&nbsp;</mtext><msub><mi>a</mi><mn>1</mn></msub>"),
    ("\\begin{cases}1&a\\\\2&b\\end{cases}", "<mrow><mo>{</mo><mtable>1,a;2,b</mtable></mrow>"),
    ("\\pmod{7}", "<mrow><mspace></mspace><mo>(</mo><mo>mod</mo><mn>7</mn><mo>)</mo></mrow>"),
    ("\\unheard{x}", "<mtext>\\unheard</mtext><mi>x</mi>"),
    ("\\frac{1", None),
    ("{" * 500, None),
    ("\\begin{matrix}1", None),
]
# Without attributes but those that say something, and tables as rows of cells.
SHORT = """(nodes) => {
  const box = document.createElement('div');
  box.append(...nodes);
  for (const one of box.querySelectorAll('*')) {
    for (const name of one.getAttributeNames()) if (!['href', 'start'].includes(name)) one.removeAttribute(name);
  }
  for (const one of box.querySelectorAll('table, mtable')) {
    const rows = [...one.querySelectorAll('tr, mtr')].map((row) => [...row.children]);
    const shown = (cell) => cell.localName === 'mtd' ? cell.textContent : cell.innerHTML;
    one.innerHTML = rows.map((row) => row.map(shown).join()).join(';');
  }
  for (const one of box.querySelectorAll('pre')) one.textContent = one.textContent;
  for (const one of [...box.querySelectorAll('button')]) one.remove();
  return box.innerHTML.replace(/<\\/?div>/g, '');
}"""


def test_markdown_and_formulas(browser):
    with live(Guard(fake_app())) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        for text, expected in MARKDOWN:
            assert browser.evaluate(f"({SHORT})(markdown({json.dumps(text)}))") == expected, text
        for text, expected in TEX:
            found = browser.evaluate(f"({SHORT})([formula({json.dumps(text)}, false)])")
            wanted = f"<code>{text}</code>" if expected is None else f"<math><mrow>{expected}</mrow></math>"
            assert found == wanted, text


@pytest.mark.parametrize(
    "text",
    [
        "*" * 20000,
        "**a" * 6000,
        "`" * 20000,
        "- " * 8000,
        ">" * 8000,
        "$a" * 8000,
        "[" * 20000,
        "\\(" * 9000,
        "|-" * 9000,
    ],
)
def test_nothing_takes_forever(browser, text):
    browser.open("about:blank")
    with live(Guard(fake_app())) as port:
        browser.open(f"http://127.0.0.1:{port}/")
        assert (
            browser.evaluate(f"(markdown({json.dumps(text)}), markdown({json.dumps(text + chr(10) + text)}), 1)") == 1
        )


def test_the_page_may_fetch_nothing_from_elsewhere():
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(
        r"""(src|href)\s*=\s*["'](?!#)|@import|url\(|innerHTML|insertAdjacent|document\.write|eval\(""", text
    )
    policy = page_headers()["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
