"""What a cache of kernels may be: damaged, somebody else's, full, in the way, without locks."""

import errno
import fcntl
import json
import os
import shutil
import stat
import time
import warnings
from pathlib import Path

import pytest

from flash8.compiler import MissingVariantError, kernel_image

pytest_plugins = ["compiler_fixtures"]

DAY = 24 * 3600.0
SOMEBODY = 4321


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.fixture
def give_away(monkeypatch):
    """Makes a file look like another user's: root gives it away, others become somebody else."""

    def give_away(path: Path) -> None:
        if os.getuid() == 0:
            os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: SOMEBODY)

    return give_away


def only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def compile_silently(workshop):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return workshop.compile()


# ---- who may read it ----


@pytest.mark.parametrize("mask, readable", [(0o022, 0o044), (0o077, 0), (0, 0o044)])
def test_entries_can_be_read_as_the_umask_says_and_written_by_nobody_else(
    workshop, umask, mask, readable
):
    umask(mask)
    workshop.compile()
    for path in [workshop.cache, *workshop.cache.rglob("*")]:
        mode = path.stat().st_mode
        assert mode & 0o044 == readable, path
        assert mode & 0o022 == 0, path
        if path.is_dir():
            assert mode & 0o011 == readable >> 2, path


# ---- whom to believe ----


def test_another_users_entry_that_others_may_write_is_compiled_again(workshop, give_away):
    folder = workshop.compile().folder
    workshop.cache.chmod(0o777)
    for path in [folder, *folder.iterdir()]:
        give_away(path)
    assert workshop.compile().cubin.is_file()
    assert workshop.compilations == 2


@pytest.mark.parametrize("name", ["kernel.cubin", "sums.json"])
def test_a_file_that_everybody_may_write_is_not_believed(workshop, name):
    (workshop.compile().folder / name).chmod(0o666)
    assert stat.S_IMODE((workshop.compile().folder / name).stat().st_mode) == 0o644
    assert workshop.compilations == 2


def test_another_users_cache_is_read_if_nobody_else_writes_there(workshop, give_away):
    workshop.compile()
    for path in [workshop.cache, *workshop.cache.rglob("*")]:
        give_away(path)
    assert compile_silently(workshop).seconds == 0


def test_another_users_cache_that_others_may_write_is_left_alone(workshop, give_away, monkeypatch):
    workshop.compile()
    workshop.cache.chmod(0o777)
    for path in [workshop.cache, *workshop.cache.rglob("*")]:
        give_away(path)
    with pytest.warns(RuntimeWarning, match=r"belongs to user \d+, and others may write to it"):
        compiled = workshop.compile()
    assert workshop.temporary in compiled.folder.parents
    monkeypatch.setenv("FLASH8_COMPILE", "never")
    shutil.rmtree(workshop.temporary)
    workshop.temporary.mkdir()
    with pytest.raises(MissingVariantError, match=r"which is not used \(.*others may write to it"):
        workshop.compile()


def test_an_entry_is_of_its_own_key(workshop):
    """Who may rename in a folder may put one good entry in the place of another."""
    one, two = workshop.compile(A="1").folder, workshop.compile(A="2").folder
    shutil.rmtree(one)
    two.rename(one)
    assert "-DA=1" in workshop.compile(A="1").ptx.read_text()


# ---- links ----


def test_no_link_is_followed_to_an_entry(workshop, tmp_path):
    folder = workshop.compile().folder
    elsewhere = tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    workshop.compile()
    assert workshop.compilations == 2
    assert not folder.is_symlink()
    assert (elsewhere / "kernel.cubin").is_file()


@pytest.mark.parametrize("name", ["kernel.cubin", "sums.json"])
def test_no_link_is_followed_to_a_file_of_an_entry(workshop, tmp_path, name):
    path = workshop.compile().folder / name
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    workshop.compile()
    assert workshop.compilations == 2
    assert not path.is_symlink()


def test_no_link_is_followed_to_the_index(workshop, tmp_path):
    workshop.compile()
    path = only(workshop.cache / "index")
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    workshop.compile()
    assert workshop.compilations == 2
    assert not path.is_symlink()


def test_no_link_is_followed_when_something_is_written(workshop, tmp_path):
    workshop.compile()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = only(workshop.cache / "locks")
    lock.unlink()
    lock.symlink_to(victim)
    workshop.header.write_text("// another tile\n")
    with pytest.warns(RuntimeWarning, match="cannot use its cache"):
        assert workshop.compile().cubin.is_file()
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["tmp", "objects", "index", "locks"])
def test_no_link_is_followed_to_a_folder(workshop, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    workshop.cache.mkdir()
    (workshop.cache / name).symlink_to(elsewhere)
    with pytest.warns(RuntimeWarning, match="cannot use its cache"):
        assert workshop.compile().cubin.is_file()
    assert list(elsewhere.iterdir()) == []


def test_a_cache_may_lie_behind_the_users_own_link(workshop, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(workshop.cache)
    workshop.compile()
    monkeypatch.setenv("FLASH8_CACHE", str(tmp_path / "link"))
    assert compile_silently(workshop).seconds == 0


# ---- damage ----

SHAPES = ["5", "null", "{}", "[]", '{"a": 1}', "[1, 2]", '"text"', '["\\u0000"]', "[[1]]", ""]
SHAPES += [
    '{"toolchain": "x", "reads": 3}',
    '{"toolchain": "x", "reads": [["/a", 5]]}',
    "[" * 100000,
]
SHAPES += ['{"toolchain": "x", "reads": [["\\ud800", "x"]]}', "1e999999", '{"kernel.cubin": 5}']


@pytest.mark.parametrize("where", ["index", "sums"])
def test_json_of_another_shape_heals(workshop, where):
    folder = workshop.compile().folder
    path = only(workshop.cache / "index") if where == "index" else folder / "sums.json"
    good = path.read_text()
    for i in range(len(SHAPES)):
        path.write_text(SHAPES[i])
        assert compile_silently(workshop).cubin.is_file()
        assert workshop.compilations == i + 2, SHAPES[i]
        assert json.loads(path.read_text()) == json.loads(good)
    workshop.compile()
    assert workshop.compilations == len(SHAPES) + 1


@pytest.mark.parametrize("where", ["index", "kernel.cubin"])
@pytest.mark.parametrize("make", ["folder", "pipe", "bytes"])
def test_something_else_in_the_place_of_a_file_heals_or_is_passed_over(workshop, where, make):
    folder = workshop.compile().folder
    path = only(workshop.cache / "index") if where == "index" else folder / where
    path.unlink()
    if make == "folder":
        path.mkdir()
    elif make == "pipe":
        os.mkfifo(path)  # to open it for reading waits for a writer
    else:
        path.write_bytes(b"\xff\xfe\x00")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a folder in the place of the index stays there
        assert workshop.compile().cubin.is_file()
    assert workshop.compilations == 2


def test_the_bytes_that_are_loaded_are_those_that_were_compared(workshop):
    cubin = workshop.compile().cubin
    good = cubin.read_bytes()
    cubin.write_bytes(good[:-3] + b"bad")
    assert kernel_image(workshop.unit(), "cubin") == good
    assert workshop.compilations == 2


# ---- nowhere to write ----


def fail(monkeypatch, name, error, cache):
    """os.<name> fails for what lies in `cache`."""
    original = getattr(os, name)

    def failing(path, *arguments, **options):
        at = options.get("dir_fd", options.get("src_dir_fd"))
        if isinstance(path, int):
            at = path
        place = os.readlink(f"/proc/self/fd/{at}") if at is not None else os.fspath(path)
        writes = name != "open" or (arguments and arguments[0] & os.O_CREAT)
        if writes and str(place).startswith(str(cache)):
            raise OSError(error, os.strerror(error))
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, name, failing)


def expect_stand_in(workshop):
    """It compiles once, into a private folder, and says so once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = workshop.compile()
        again = workshop.compile()
        other = workshop.compile(OTHER="1")
    said = [str(warning.message) for warning in caught]
    assert len(said) == 1 and said[0].startswith(f"flash8 cannot use its cache {workshop.cache} (")
    assert "FLASH8_CACHE names another folder" in said[0]
    assert compiled.cubin.is_file() and again.seconds == 0
    assert workshop.compilations == 2
    root = compiled.folder.parent.parent
    assert root.parent == workshop.temporary and other.folder.parent.parent == root
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    return said[0]


@pytest.mark.parametrize(
    "name, error",
    [
        ("mkdir", errno.EROFS),
        ("open", errno.EACCES),
        ("rename", errno.EROFS),
        ("fsync", errno.ENOSPC),
    ],
)
def test_a_cache_that_cannot_be_written_has_a_stand_in(workshop, monkeypatch, name, error):
    workshop.compile(FIRST="1")
    workshop.log.write_text("")
    fail(monkeypatch, name, error, workshop.cache)
    if name == "mkdir":
        shutil.rmtree(workshop.cache / "tmp")
    assert os.strerror(error) in expect_stand_in(workshop)
    assert compile_silently(workshop).seconds == 0
    assert workshop.compile(FIRST="1").folder.is_relative_to(workshop.cache)  # it is still read


def test_a_read_only_cache_that_has_it_all_is_used_in_silence(workshop, monkeypatch):
    folder = workshop.compile().folder
    for name in ("mkdir", "open", "rename"):
        fail(monkeypatch, name, errno.EROFS, workshop.cache)
    assert compile_silently(workshop).folder == folder


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_has_a_stand_in(workshop, monkeypatch, error):
    flock = fcntl.flock

    def no_locks(descriptor, operation):
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(workshop.cache)):
            raise OSError(error, os.strerror(error))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", no_locks)
    expect_stand_in(workshop)


@pytest.mark.parametrize("name", ["", "tmp", "locks", "objects", "index"])
def test_a_file_in_the_way_has_a_stand_in(workshop, name):
    path = workshop.cache / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("in the way")
    expect_stand_in(workshop)
    assert path.read_text() == "in the way"


def test_a_file_further_up_has_a_stand_in(workshop, monkeypatch):
    (workshop.folder / "file").write_text("")
    workshop.cache = workshop.folder / "file" / "cache"
    monkeypatch.setenv("FLASH8_CACHE", str(workshop.cache))
    expect_stand_in(workshop)


def test_a_place_where_not_even_root_writes_has_a_stand_in(workshop, monkeypatch):
    workshop.cache = Path("/proc/flash8")
    monkeypatch.setenv("FLASH8_CACHE", str(workshop.cache))
    expect_stand_in(workshop)


@pytest.mark.parametrize("home", [None, "", "relative"])
def test_without_a_home_there_is_a_private_folder(workshop, monkeypatch, home):
    import pwd

    def unknown(uid):
        raise KeyError(uid)

    for name in ("FLASH8_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert workshop.temporary in compile_silently(workshop).folder.parents
    assert compile_silently(workshop).seconds == 0


def test_a_relative_cache_folder_of_the_user_is_ignored_as_its_standard_says(workshop, monkeypatch):
    monkeypatch.delenv("FLASH8_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(workshop.folder))
    monkeypatch.chdir(workshop.folder)
    assert workshop.compile().folder.is_relative_to(workshop.folder / ".cache" / "flash8")


def test_a_relative_cache_stays_where_it_was_when_the_process_moves(workshop, monkeypatch):
    monkeypatch.chdir(workshop.folder)
    monkeypatch.setenv("FLASH8_CACHE", "cache")
    compiled = workshop.compile()
    monkeypatch.chdir("/")
    assert compiled.cubin.is_file()


@pytest.mark.parametrize("trap", ["link", "stranger", "open"])
def test_the_private_folder_is_nobody_elses(workshop, monkeypatch, tmp_path, give_away, trap):
    monkeypatch.setenv("FLASH8_CACHE", "/proc/flash8")
    trapped = workshop.temporary / f"flash8-cache-{os.geteuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if trap == "link":
        trapped.symlink_to(elsewhere)
    else:
        trapped.mkdir(mode=0o777)
        trapped.chmod(0o777)
        if trap == "stranger":
            give_away(trapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = workshop.compile().folder.parent.parent
        assert workshop.compile().seconds == 0
    assert (root == trapped) == (trap == "open")
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    assert list(elsewhere.iterdir()) == []


def test_a_full_disk_while_compiling_is_no_fault_of_the_source(workshop):
    workshop.source.write_text("REFUSE: No space left on device\n")
    with pytest.raises(OSError, match=r"No space left on device[\s\S]*TMPDIR") as caught:
        workshop.compile()
    assert caught.value.errno == errno.ENOSPC


# ---- what is left behind ----


def test_old_leavings_are_swept_and_new_ones_stay(workshop):
    workshop.compile(FIRST="1")
    old_time = time.time() - 2 * DAY
    places = [workshop.cache / "tmp", workshop.temporary]
    for place in places:
        for name, age in (("flash8-build-old", old_time), ("flash8-build-new", time.time())):
            (place / name).mkdir()
            (place / name / "kernel.ptx").write_text("")
            os.utime(place / name, (age, age))
    (workshop.temporary / "somebody's").mkdir()
    os.utime(workshop.temporary / "somebody's", (old_time, old_time))
    workshop.compile()
    for place in places:
        left = {path.name for path in place.iterdir()} - {"somebody's"}
        assert left == {"flash8-build-new"}
    assert (workshop.temporary / "somebody's").exists()


def test_another_users_leavings_stay(workshop, give_away):
    workshop.compile(FIRST="1")
    if os.getuid() != 0:
        pytest.skip("needs to give a folder away")
    left = workshop.cache / "tmp" / "left"
    left.mkdir()
    os.utime(left, (0, 0))
    give_away(left)
    workshop.compile()
    assert left.exists()
