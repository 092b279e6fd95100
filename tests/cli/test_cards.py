"""What ``docs/deploying.md`` says is what ``inspect`` computes, and that is what a hand finds."""

import re
from pathlib import Path

import pytest
from cli.test_inspect import recipe

from deepseek_jax.checkpoint.hf_save import released_bytes
from deepseek_jax.cli import cards
from deepseek_jax.cli.main import main

DOCUMENT = Path(__file__).parents[2] / "docs" / "deploying.md"
COMMANDS = re.findall(r"`deepseek-jax (inspect .* --markdown)`\n\n((?:\|.*\n)+)", DOCUMENT.read_text())


@pytest.mark.parametrize(("command", "table"), COMMANDS, ids=[command.split()[1] for command, _ in COMMANDS])
def test_the_documents_tables_are_what_the_command_prints(command, table, capsys):
    assert main(command.split()) == 0
    assert capsys.readouterr().out == table


def test_the_document_has_the_whole_model_and_the_six_students():
    names = {command.split()[1] for command, _ in COMMANDS}
    students = "qwen_1_5b", "qwen_7b", "llama_8b", "qwen_14b", "qwen_32b", "llama_70b"
    assert names >= {"models/deepseek_v3", *(f"models/r1_distill_{name}" for name in students)}


def test_v3_by_hand():
    """Of 671,026,419,200 numbers these are no matrix of a layer, or are read by head: embedding and head 2 · 129,280 ·
    7,168; 61 kv_b of 512 × 32,768; 58 routers of 7,168 × 256 with a bias of 256; two norms of 7,168 and one each of
    1,536 and 512 in 61 layers, and the last. Of the rest each 128 terms have a scale."""
    found = {kind: cards.footprint(recipe("deepseek_v3"), kind, context=4096) for kind in cards.KINDS}
    plain = 2 * 129_280 * 7168 + 61 * 512 * 32_768 + 58 * 7168 * 256 + 61 * (2 * 7168 + 1536 + 512) + 7168
    quantised = 671_026_419_200 - plain - 58 * 256
    # 7,168, 1,536, 2,048, 16,384 and 18,432 are multiples of 128.
    for kind, bits in {"INT8": 8, "INT4": 4}.items():
        assert found[kind].weights == quantised * bits // 8 + 2 * quantised // 128 + 2 * plain + 4 * 58 * 256
    assert found["bfloat16"].weights == 2 * (plain + quantised) + 4 * 58 * 256
    assert all(its.cache == 61 * 576 * 2 * 4096 for its in found.values())
    read = found["bfloat16"].read - found["bfloat16"].cache
    assert read == pytest.approx(2 * (37_552_297_472 - 129_280 * 7168), rel=1e-6)
    h200 = next(card for card in cards.CARDS if card.name == "H200")
    assert found["INT4"].cards(h200) == 3 and found["bfloat16"].cards(h200) == 11
    assert found["INT4"].steps(h200) == 3 * 4.8e12 / found["INT4"].read


@pytest.mark.parametrize(("kind", "dtype"), cards.KINDS.items())
def test_memory_is_what_a_folder_of_the_model_holds(kind, dtype):
    """But for the sizes that lie beside packed numbers."""
    model = recipe("r1_distill_qwen_7b")
    shapes = 16 * 28 * 7 if kind.startswith("INT") else 0
    assert cards.footprint(model, kind, context=1).weights == released_bytes(model, dtype) - shapes


def test_rows_read_more_experts(capsys):
    """Of 256 experts 8 each: 64 rows that choose by themselves leave (1 - 8 / 256)^64 = 13 % of them."""
    one, many = (cards.footprint(recipe("deepseek_v3"), "INT4", context=1, rows=rows) for rows in (1, 64))
    assert (
        many.read < many.weights + many.cache and 0.8 < many.read / many.weights < 0.9 and one.read < 0.08 * one.weights
    )
    assert main(["inspect", "models/deepseek_v3", "--rows", "0"]) == 1
    assert "--rows 0: must be at least 1" in capsys.readouterr().err
