"""What is printed is the text as it stands, on terminals too."""

from deepseek_jax.saying import doing, say


def test_nothing_in_a_text_is_markup(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    say("[/INST] :key:")
    with doing("reading a[/b]") as tell:
        tell("[/c]")
    shown = capsys.readouterr().err
    assert "[/INST] :key:" in shown and "reading a[/b]" in shown
