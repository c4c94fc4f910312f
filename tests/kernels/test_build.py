import os
import subprocess
import sys

import pytest
from kernels.works import assert_same, copy_work, make_work

from ds_quant.kernels import build, registry
from ds_quant.kernels.adamw import reference
from ds_quant.kernels.adamw.ops import adamw_

WORKS = build.load().library is not None
needs_compiler = pytest.mark.skipif(not WORKS, reason="no C++ compiler")


def test_where_there_is_a_compiler_there_are_kernels():
    """The kernels' own tests are left out where nothing was built: a mistake in the sources must not pass so."""
    try:
        build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))
    assert build.load().reason == ""


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing loaded yet; quick builds, for only the plain instruction set is built."""
    monkeypatch.setenv("DS_QUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "ISA_FLAGS", {"plain": ()})
    monkeypatch.setattr(build, "FLAGS", tuple(flag for flag in build.FLAGS if flag != "-O3"))
    caches = (build.load, registry._serving, registry._is_ready)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "cache" / "kernels"
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A library as it is cached."""
    path = tmp_path_factory.mktemp("good") / "good.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "ISA_FLAGS", {"plain": ()})
        build._build(path, build.find_compiler())
    return path.read_bytes()


@pytest.fixture
def builds(good, monkeypatch):
    """Paths that are built, in an instant."""
    built = []

    def fake_build(path, compiler):
        built.append(path)
        path.write_bytes(good)

    monkeypatch.setattr(build, "_build", fake_build)
    return built


def libraries(folder):
    return sorted(path.name for path in folder.iterdir())


@needs_compiler
def test_the_second_load_builds_nothing(fresh, monkeypatch):
    assert build.load().library is not None
    (name,) = libraries(fresh)
    assert name.endswith(".so")
    assert (fresh.stat().st_mode & 0o777) == 0o700
    build.load.cache_clear()
    monkeypatch.setattr(build, "_build", None)
    assert build.load().library is not None


@needs_compiler
def test_the_key_follows_sources_flags_and_compiler(fresh, monkeypatch, tmp_path):
    compiler = build.find_compiler()
    keys = [build.cache_key(compiler), build.cache_key([*compiler, "-g"])]
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in build.SOURCES:
        (sources / name).write_bytes((build.FOLDER / name).read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(build, "FOLDER", sources)
        assert build.cache_key(compiler) == keys[0]
        for name in build.SOURCES:
            with (sources / name).open("a") as file:
                file.write("\n")
            keys.append(build.cache_key(compiler))
    with monkeypatch.context() as patch:
        patch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
        keys.append(build.cache_key(compiler))
    other = tmp_path / "c++"
    for version in (1, 2):
        other.write_text(f"#!/bin/sh\necho version {version}\n")
        other.chmod(0o755)
        keys.append(build.cache_key([str(other)]))
    assert len(set(keys)) == len(keys)


def test_every_source_is_part_of_the_key():
    assert set(build.SOURCES) == {path.name for path in build.FOLDER.iterdir() if path.suffix in (".cpp", ".h")}


@needs_compiler
def test_two_processes_that_build_at_once(fresh):
    program = (
        "from ds_quant.kernels import build; build.ISA_FLAGS = {'plain': ()}; assert build.load().library, build.load()"
    )
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    running = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    assert len(libraries(fresh)) == 1


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "sealed nonsense"])
def test_a_damaged_library_is_built_anew(fresh, good, builds, damage):
    changed = bytearray(good)
    changed[len(good) // 2] ^= 1
    nonsense = b"not a library"
    damaged = {
        "cut": good[: len(good) // 2],
        "changed": bytes(changed),
        "empty": b"",
        "sealed nonsense": nonsense + build.hashlib.sha256(nonsense).digest(),
    }
    path = fresh / f"{build.cache_key(build.find_compiler())}.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged[damage])
    assert build.load().library is not None
    assert builds == [path]


@needs_compiler
def test_a_cache_that_cannot_be_written_to(fresh, builds):
    fresh.parent.write_text("a file where the folder should be")
    assert build.load().library is not None
    assert len(builds) == 1
    assert not builds[0].exists()


def test_without_a_compiler_the_reference_serves_and_says_so_once(rng, fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    check_fallback(rng, caplog, "CXX='no-such-compiler' is no program")


def test_what_a_failing_compiler_says_is_kept(rng, fresh, monkeypatch, caplog, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    check_fallback(rng, caplog, "this compiler is broken")
    assert libraries(fresh) == []


def test_compilers_are_tried_in_turn(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"none of c\+\+, g\+\+, clang\+\+ is installed"):
        build.find_compiler()
    for name in ("clang++", "g++"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
        assert build.find_compiler() == [str(tmp_path / name)]


def test_importing_builds_nothing(tmp_path):
    program = "import ds_quant.kernels.adamw.ops, ds_quant.kernels.adamw.cpu"
    environment = {**os.environ, "DS_QUANT_CACHE": str(tmp_path / "cache"), "CXX": "/bin/false"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=300)
    assert not (tmp_path / "cache").exists()


def check_fallback(rng, caplog, reason):
    assert adamw_.implementation("cpu") == "reference"
    work = make_work(rng, 300, ("power", 8), ("power", 4))
    expected = copy_work(work)
    reference.adamw_([expected])
    with caplog.at_level("WARNING", logger="ds_quant"):
        adamw_([work])
        adamw_([copy_work(work)])
    assert_same(work, expected)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "could not be built" in warnings[0]
    assert "CXX" in warnings[0]
    assert reason in warnings[0]


def open_to_all(path):
    path.chmod(path.stat().st_mode | 0o022)


def foreign(path):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    os.chown(path, 65534, 65534)


@needs_compiler
@pytest.mark.parametrize("spoil", [open_to_all, foreign])
@pytest.mark.parametrize("what", ["folder", "parent"])
def test_a_cache_that_others_can_write_to_is_not_used(fresh, builds, good, caplog, what, spoil):
    """The planted library is whole, by its own hash: only who can have put it there tells that it is not ours."""
    fresh.mkdir(mode=0o700, parents=True)
    planted = fresh / f"{build.cache_key(build.find_compiler())}.so"
    planted.write_bytes(good)
    planted.chmod(0o700)
    spoiled = fresh if what == "folder" else fresh.parent
    spoil(spoiled)
    assert build.load().library is not None
    assert len(builds) == 1
    assert builds[0].parent != fresh
    assert f"{spoiled} {'can be written to' if spoil is open_to_all else 'belongs to'}" in caplog.text
    assert "set DS_QUANT_CACHE to a folder of your own" in caplog.text


@needs_compiler
@pytest.mark.parametrize("spoil", [open_to_all, foreign])
def test_a_library_that_others_can_write_to_is_built_anew(fresh, builds, good, spoil):
    fresh.mkdir(mode=0o700, parents=True)
    planted = fresh / f"{build.cache_key(build.find_compiler())}.so"
    planted.write_bytes(good)
    spoil(planted)
    assert build.load().library is not None
    assert builds == [planted]


@needs_compiler
def test_a_folder_behind_a_foreign_link_is_not_used(fresh, builds, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    (tmp_path / "own").mkdir(mode=0o700)
    fresh.parent.symlink_to(tmp_path / "own")
    os.lchown(fresh.parent, 65534, 65534)
    assert build.load().library is not None
    assert builds[0].parent != fresh


@needs_compiler
def test_what_is_built_is_this_users_alone(fresh):
    old = os.umask(0)
    try:
        assert build.load().library is not None
    finally:
        os.umask(old)
    (library,) = fresh.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (library, fresh, fresh.parent)] == [0o700] * 3
    assert build.why_unsafe(library) == ""


def test_sticky_folders_may_hold_a_cache(tmp_path):
    tmp_path.chmod(0o1777)
    build._make_private(tmp_path / "cache" / "kernels")
    tmp_path.chmod(0o777)
    with pytest.raises(build._Unsafe, match="can be written to by others"):
        build._make_private(tmp_path / "cache" / "kernels")
