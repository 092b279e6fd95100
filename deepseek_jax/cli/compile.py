"""``compile``: a recipe for a machine that is not there."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from deepseek_jax.parallel.compilers import add_compilers

add_compilers()  # before jax is imported

from deepseek_jax.parallel.roofline import Traffic  # noqa: E402
from deepseek_jax.parallel.topology import Topology  # noqa: E402
from deepseek_jax.saying import quietly, terminal  # noqa: E402
from deepseek_jax.typed import check_types  # noqa: E402
from deepseek_jax.workflows.compile import Found, compile_for  # noqa: E402
from deepseek_jax.workflows.pretrain import PretrainConfig  # noqa: E402
from deepseek_jax.workflows.recipe import load_recipe  # noqa: E402

_SHOWN = 12  # lines of traffic


@dataclasses.dataclass(frozen=True)
class Compile:
    """Compile a recipe's program ahead of time for devices that are not here: does it fit, what does it send, how long
    would it take. The estimate is a roofline: peaks of TPUs, shares of it that were measured of GPUs, even loads."""

    recipe: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    topology: str = ""
    """CHIP:SHAPE: v5p:8x8x16, v6e:16x16, tpu7x:4x4x8 (chips along the torus), v6e:16x16x2slices (two such), h100:256,
    h200:2048 (GPUs, in nodes of 8). Devices must be as many as the recipe's mesh has."""
    work: Literal["train", "prefill", "decode"] = "train"
    """The train step, the pass over prompts up to their answers' first tokens, or a token more of each answer."""
    columns: int = 0
    """Tokens of a row, in decoding those that a row has room for; 0: the recipe's data.seq_len."""
    until: Literal["compiled", "scheduled"] = "compiled"
    """scheduled: a TPU's compiler is stopped where it has put the program in order and laid out its memory. All figures
    are of that; without machine code, which is most of the work, it takes a minute or two instead of many and a
    fourth of the memory, and what only the making of machine code refuses (a kernel's own memory) is not seen."""
    json: bool = False
    """Print one JSON object instead of tables."""
    hlo: str = ""
    """A file for the compiled program's text."""

    def __post_init__(self) -> None:
        check_types(self)


def run_compile(arguments: Sequence[str]) -> None:
    if not arguments or arguments[0].startswith("-"):
        name, options = "the defaults", tyro.cli(Compile, args=list(arguments), prog="deepseek-jax compile")
    else:
        name, *rest = arguments
        default = Compile(load_recipe(name, PretrainConfig))
        options = tyro.cli(Compile, args=rest, default=default, prog=f"deepseek-jax compile {name}")
    topology = Topology.parse(options.topology)
    with quietly(options.json):
        found = compile_for(options.recipe, topology, options.work, options.columns, options.until)
    if options.hlo and found.text:
        Path(options.hlo).write_text(found.text, encoding="utf-8")
    if options.json:
        print(json.dumps(as_json(found)))
    else:
        show(terminal(), name, found)


def as_json(found: Found) -> dict[str, Any]:
    """All that was found, but for the program's text."""
    told = dataclasses.asdict(dataclasses.replace(found, text=""))
    del told["text"]
    return told | {"mfu": found.mfu, "verdict": verdict(found)}


def verdict(found: Found) -> str:
    """Whether it fits, by how much, and what to look at."""
    total, room = found.memory["total"], found.available
    by_size = sorted((size, name) for name, size in found.memory.items() if name != "total")
    most = f"most of it {by_size[-1][1]}, {_gib(by_size[-1][0])}"
    if not found.fits:
        where = f"; the largest array {_gib(found.largest[0][0])}, {found.largest[0][1]}" if found.largest else ""
        if total <= room:  # the compiler gives no numbers, and these are the arrays that have shapes
            return f"does not fit: {found.refusal}"
        least = "" if found.compile_seconds else "at least "
        told = f"does not fit: {least}{_gib(total)} of {_gib(room)}, {_gib(total - room)} too much; {most}{where}"
        return told + _state(found)
    told = f"fits: {_gib(total)} of {_gib(room)}, {_gib(room - total)} to spare; {most}"
    if found.estimate is None or not found.estimate.traffic:
        return told
    worst = found.estimate.traffic[0]
    if worst.exposed < 0.03 * found.estimate.seconds:
        return f"{told}; no collective costs 3 % of the time"
    share = worst.exposed / found.estimate.seconds
    return f"{told}; look at the {worst.kind} over {_axes(worst)} of {worst.scope}: {share:.0%} of the time"


def _state(found: Found) -> str:
    """Of a step whose state would leave less than half of the memory on whatever mesh."""
    evenly = found.parameters * found.state_bytes / found.devices
    if evenly < found.available / 2:
        return ""
    each = f"{found.state_bytes:.3g} bytes of each of {found.parameters / 1e9:,.1f} B parameters"
    return f"; parameters and moments are {each}, {_gib(evenly)} a device if split evenly, before any gradient"


def show(console: Console, name: str, found: Found) -> None:
    title = f"{name} on {found.topology}: {found.work}"
    table = Table(title=title, show_header=False)
    mesh = " × ".join(f"{axis} {size}" for axis, size in found.mesh.items() if size > 1)
    table.add_row("devices", f"{found.devices:,}: {mesh or 'one'}")
    for category, size in found.memory.items():
        table.add_row(category, f"{_gib(size)}" + (f" of {_gib(found.available)}" if category == "total" else ""))
    for fact, value in _facts(found):
        table.add_row(fact, value)
    console.print(table)
    if found.estimate is not None and found.estimate.traffic:
        for line in _traffic(found.estimate.traffic):
            console.print(line, soft_wrap=True)
    if found.estimate is not None and (sent := found.estimate.between_slices):
        seconds = _seconds(sent / Topology.parse(found.topology).chip.slow)
        told = f"{sent / 1e9:,.1f} GB leave a device's slice beside these, {seconds} of their links, not in the time"
        console.print(told, soft_wrap=True)
    for size, scope in found.largest[:5] if not found.fits else ():
        console.print(f"{_gib(size):>12}  {scope}", soft_wrap=True)
    for scope, count in (found.estimate.unknown if found.estimate else {}).items():
        console.print(f"{count} × {scope}: counts by its bytes alone", soft_wrap=True)
    console.print(verdict(found), soft_wrap=True)


def _facts(found: Found) -> Iterator[tuple[str, str]]:
    yield f"{found.until} in", f"{found.compile_seconds:.0f} s" if found.compile_seconds else f"no: {found.refusal}"
    yield "FLOPs a device", f"{found.model_flops:.3g} of the model's own"
    estimate = found.estimate
    if estimate is None:
        return
    yield "", f"{estimate.flops:.3g} with what is done again; {estimate.memory_bytes / 1e9:,.0f} GB read and written"
    yield "estimated time", f"{_seconds(estimate.seconds)}: {_seconds(estimate.compute)} of work"
    yield "", f"{_seconds(estimate.exposed)} of waiting for collectives"
    yield (
        "tokens/s",
        f"{found.tokens / estimate.seconds:,.0f}; {found.tokens / estimate.seconds / found.devices:,.0f} a device",
    )
    yield "MFU", f"{found.mfu:.1%}"


def _traffic(traffic: list[Traffic]) -> Iterator[str]:
    yield "collectives of one device, by the time that it waits for them:"
    for one in traffic[:_SHOWN]:
        links = "between slices or nodes" if one.crosses else "within"
        apart = ", asynchronous" if one.asynchronous else ""
        waits = f"{_seconds(one.exposed):>8} of {_seconds(one.seconds):>8}"
        sent = f"{one.sent / 1e9:9,.2f} GB in {one.times:5,}"
        yield f"{waits}  {sent}  {one.kind} over {_axes(one)}, {links}{apart}: {one.scope}"
    if rest := traffic[_SHOWN:]:
        exposed, seconds, sent = (sum(getattr(one, name) for one in rest) for name in ("exposed", "seconds", "sent"))
        yield f"{_seconds(exposed):>8} of {_seconds(seconds):>8}  {sent / 1e9:9,.2f} GB in {len(rest)} others"
    yield from _sums(traffic)


def _sums(traffic: list[Traffic]) -> Iterator[str]:
    """Bytes by kind of link and of collective."""
    for crosses, links in ((False, "within"), (True, "between slices or nodes")):
        kinds = {one.kind: 0.0 for one in traffic if one.crosses == crosses}
        for one in traffic:
            if one.crosses == crosses:
                kinds[one.kind] += one.sent
        if kinds:
            told = ", ".join(f"{kind} {sent / 1e9:,.1f}" for kind, sent in kinds.items())
            yield f"GB sent {links}: {sum(kinds.values()) / 1e9:,.1f} ({told})"


def _axes(one: Traffic) -> str:
    return " × ".join(one.axes) or "none"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _seconds(seconds: float) -> str:
    return "0" if not seconds else f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
