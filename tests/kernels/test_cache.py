"""Where compiled things are kept: what is set suffices, and where nothing can be had a folder of one's own."""

from pathlib import Path

from deepseek_kernels.cache import cache_folder, user_folder


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_what_is_set_suffices(monkeypatch, tmp_path):
    """A home is not even asked for."""
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "deepseek-jax" and cache_folder().is_dir()


def test_the_home_is_used_and_where_there_is_none_a_temporary_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "deepseek-jax"
    found = []
    (tmp_path / "file").touch()
    for home in (no_home, lambda: tmp_path / "file"):  # none, and one that cannot be written to
        monkeypatch.setattr(Path, "home", home)
        found.append(cache_folder())
        assert user_folder() is None
    assert found[0] == found[1] and found[0].stat().st_mode & 0o777 == 0o700
