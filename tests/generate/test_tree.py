"""The files of a hostile tree: what git would list is listed, and nothing else is read, followed or waited for."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UnusableInput
from configs.prompt_sources import RepositorySource
from generate.tree import Tree, scan_tree, tree_hash, walk


def scan(folder: Path, **changes: object) -> Tree:
    return scan_tree(RepositorySource(path=".", budget_tokens=1000, count=1).model_copy(update=changes), [folder])


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def paths(tree: Tree) -> list[str]:
    return [file.path for file in tree.files]


IGNORES: dict[str, str | bytes] = {
    ".gitignore": "*.log\n!kept.log\nbuild/\n/only-top\n# words\n\ndoc/**/draft.md\n*.[oa]\ntrailing \nescaped\\ \n!\n**/deep/\n",
    "sub/.gitignore": "!a.log\n*.py\n!main.py\nnested/*\n!nested/keep.txt\n",
    "sub/more/.gitignore": "!b.py\n",
    "build/.gitignore": "!x.py\n",
    "odd/.gitignore": b"\xff\xfe\n*.txt\n",
    **dict.fromkeys(
        (
            "a.log", "kept.log", "build/x.py", "only-top", "sub/only-top", "doc/a/b/draft.md", "doc/final.md", "lib.o", "lib.c",
            "trailing", "escaped ", "sub/deep/x.py", "sub/a.log", "sub/b.py", "sub/main.py", "sub/nested/lost.txt",
            "sub/nested/keep.txt", "sub/more/b.py", "odd/x.txt", "odd/x.py",
        ),
        "x",
    ),
}  # fmt: skip


def listed_by_git(folder: Path) -> list[str]:
    command = ["git", "-c", "core.excludesFile=", "ls-files", "-z", "--others", "--exclude-standard"]
    return sorted(subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True).stdout.split("\0")[:-1])


def test_ignore_files_mean_what_git_says_they_mean(tmp_path: Path) -> None:
    write(tmp_path, IGNORES)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    assert sorted(walk(tmp_path, "t", Counter())) == listed_by_git(tmp_path)
    below = [path.removeprefix("sub/") for path in listed_by_git(tmp_path) if path.startswith("sub/")]
    assert sorted(walk(tmp_path / "sub", "t", Counter())) == below  # rules above the root count too
    assert sorted(walk(tmp_path / "build", "t", Counter())) == [".gitignore", "x.py"]  # but a folder named outright is read


def test_what_is_no_readable_text_is_counted_and_left_out(tmp_path: Path) -> None:
    write(
        tmp_path, {"a.py": "1\n", "nul": b"a\0b", "latin": b"\xe9t\xe9", "empty": " \n", "big.txt": "x" * 300, ".git/config": "x"}
    )
    write(tmp_path, {"two\nlines.py": "1\n"})
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.py"))).write_text("1\n")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "outside").symlink_to("/etc/passwd")
    (tmp_path / "dangling").symlink_to("nowhere")
    tree = scan(tmp_path, max_file_bytes=200)
    assert paths(tree) == ["a.py"]
    assert tree.skipped == {
        "binary": 2, "empty": 1, "not a regular file": 1, "symbolic link": 3, "too large": 1, "unprintable name": 2,
    }  # fmt: skip


def test_include_and_exclude_are_patterns_as_in_gitignore(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "1", "b.md": "1", "sub/c.py": "1", "sub/test_d.py": "1"})
    assert paths(scan(tmp_path, include=("*.py",), exclude=("test_*",))) == ["a.py", "sub/c.py"]
    assert paths(scan(tmp_path, include=("/*.py",))) == ["a.py"]


def test_a_licence_is_what_a_file_says_or_the_nearest_licence_file(tmp_path: Path) -> None:
    write(
        tmp_path, {"a.py": "# SPDX-License-Identifier: Apache-2.0 OR MIT\n", "sub/b.py": "1", "sub/COPYING": "GPL", "c/d.py": "1"}
    )
    found = {file.path: file.licence for file in scan(tmp_path).files}
    assert found == {"a.py": "Apache-2.0 OR MIT", "sub/b.py": "see sub/COPYING", "sub/COPYING": "see sub/COPYING", "c/d.py": ""}
    write(tmp_path, {"LICENSE.txt": "MIT"})
    assert {file.path: file.licence for file in scan(tmp_path).files}["c/d.py"] == "see LICENSE.txt"


def test_a_tree_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnusableInput, match=r"repository \.: no text file to ask about \(no files\)"):
        scan(tmp_path)
    write(tmp_path, {"nul": b"\0"})
    with pytest.raises(UnusableInput, match=r"\(1 binary\)"):
        scan(tmp_path)
    with pytest.raises(UnusableInput, match="repository nowhere: no such folder"):
        scan(tmp_path, path="nowhere")


def test_ten_thousand_files_come_sorted_and_hashed(tmp_path: Path) -> None:
    names = [f"d{number % 100}/f{number}.py" for number in range(10_000)]
    for folder in range(100):
        (tmp_path / f"d{folder}").mkdir(parents=True)
    for name in names:
        (tmp_path / name).write_text(name)
    tree = scan(tmp_path)
    assert paths(tree) == sorted(names)
    assert all(file.sha256 == hashlib.sha256(file.path.encode()).hexdigest() for file in tree.files)
    changed = tree.files[7]._replace(sha256="0" * 64)
    assert tree_hash(tree) != tree_hash(replace(tree, files=(changed, *tree.files[1:])))


def test_a_file_that_changes_after_the_scan_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"a.py": "1\n", "b.py": "1\n"})
    tree = scan(tmp_path)
    write(tmp_path, {"a.py": "2\n"})
    (tmp_path / "b.py").unlink()
    os.mkfifo(tmp_path / "b.py")
    for file in tree.files:
        with pytest.raises(UnusableInput, match=rf"{file.path} changed while prompts were built"):
            tree.read(file)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user may enter; pytest's own are closed."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("path", ["closed.py", "closed/a.py"])
def test_a_file_that_may_not_be_read_is_named_and_not_passed_over(open_folder: Path, path: str) -> None:
    write(open_folder, {"a.py": "1", path: "1"})
    (open_folder / path.partition("/")[0]).chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # to root everything is open
    try:
        with pytest.raises(UnusableInput, match=rf": {path.removesuffix('a.py')}: Permission denied; exclude it"):
            scan(open_folder)
    finally:
        os.seteuid(user)
        (open_folder / path.partition("/")[0]).chmod(0o755)
