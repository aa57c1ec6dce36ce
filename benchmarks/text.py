"""English to train and to measure on, from public repositories at fixed commits; checked by hash, never committed here.

    python benchmarks/text.py --out text/                    clones what it needs (about 60 MB), a few minutes
    python benchmarks/text.py --out text/ --from CLONES/     reads clones that are there: CLONES/<repository's name>

Writes `train.jsonl` (one document a line: source, text), and for measuring `tune.txt` (settings are chosen on it),
`report.txt` (figures are told of it), `wikitext2.txt` (WikiText-2's validation split) and `hellaswag.json`. `tune` and
`report` are documents that `train` does not have: of textbooks and proposals every twentieth each, of novels one each.

Textbooks are OpenStax's (Creative Commons, most of them non-commercial), novels Project Gutenberg's, and the rest is
the Python Enhancement Proposals and Rust's RFCs: their licences are their own.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

#: sha256 of what is written.
SHA256 = {
    "hellaswag.json": "8435df6f6f806612ee6e8328877ddf79d42bc67c0589af34038aeef8b2525685",
    "report.txt": "4fc194edbdf4fbb286ec4f51f6350a03c45a283f8c9515774b385069bb2367e4",
    "train.jsonl": "7960aa0e2b8b9e55b2deeba1afedac3eadfb62fd63f6db6b041470e2a131e0b5",
    "tune.txt": "0505e53bc3baf3ce179344f833028f06cde3c702b43c58bfbc0f80c5d44d7536",
    "wikitext2.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
}

#: Every so many documents of a source one goes to `tune` and one to `report`, until these have so many characters.
HELD_OUT_EVERY = 20
HELD_OUT_LENGTH = 1_200_000


class Source(NamedTuple):
    """Documents of one repository."""

    repository: str  # owner/name on GitHub
    commit: str
    paths: tuple[str, ...]  # files and folders
    read: Callable[[bytes], str]
    part: str | None = None  # the one text that all of it belongs to; None: most to train
    limit: int | None = None  # characters to train on


# -- from a file to its text


def textbook(data: bytes) -> str:
    """Titles and paragraphs of a CNXML module; formulas, exercises, tables and references are left out."""
    left_out = {"metadata", "exercise", "table", "figure", "media", "glossary", "note", "list", "equation", "math"}
    found: list[str] = []

    def words(node: ElementTree.Element) -> str:
        shown = {"link": "the figure"}  # an empty one stands for a number that the book's maker fills in
        inner = "".join(
            ("" if name(child) in left_out else words(child) or shown.get(name(child), "")) + (child.tail or "")
            for child in node
        )
        return (node.text or "") + inner

    def name(node: ElementTree.Element) -> str:
        return str(node.tag).rpartition("}")[2]

    def visit(node: ElementTree.Element) -> None:
        for child in node:
            kind = name(child)
            if kind in left_out or "references" in child.get("class", ""):
                continue
            if kind in ("title", "para"):
                found.append(" ".join(words(child).split()))
            else:
                visit(child)

    visit(ElementTree.fromstring(data))
    return "\n\n".join(text for text in found if text)


def novel(data: bytes) -> str:
    """The book without the preamble and the licence; one line a paragraph."""
    text = data.decode("utf-8-sig").replace("\r\n", "\n")
    text = re.split(r"\*\*\* ?START OF TH[^\n]*\*\*\*", text)[-1]
    text = re.split(r"\*\*\* ?END OF TH|End of (?:the )?Project Gutenberg", text)[0]
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def proposal(data: bytes) -> str:
    """A PEP or an RFC without its header; as it is otherwise, code too."""
    return data.decode("utf-8").replace("\r\n", "\n").partition("\n\n")[2].strip()


def plain(data: bytes) -> str:
    return data.decode("utf-8")


def hellaswag(data: bytes) -> str:
    """The validation split (10,042 items) as JSON: {"context", "endings" (4), "label"}."""
    lines = bz2.decompress(data).decode("utf-8").splitlines()
    items = [lines[i : i + 6] for i in range(0, len(lines) - 5, 6)]
    return json.dumps([{"context": i[0], "endings": i[2:], "label": int(i[1])} for i in items], ensure_ascii=False)


def _textbooks(**commits: str) -> list[Source]:
    return [
        Source(f"openstax/osbooks-{name.replace('_', '-')}", commit, ("modules",), textbook)
        for name, commit in commits.items()
    ]


SOURCES = [
    *_textbooks(
        anatomy_physiology="f3a1239631d5cc525e4b46874b6cdc3ca4fda15a",
        astronomy="dff6acf8df597ceda73985308f838ed38417a606",
        introduction_anthropology="418eedd9bef21ec1a6fa1b472c0d82c084e35c70",
        introduction_philosophy="ec6340117385f06d8e094850bade8948fe7ba002",
        introduction_political_science="61afbf50d27ba833feb64b66ba06a5384e9f371c",
        introduction_sociology="ab8839c5c5340cb4dffbc310699da450549deb20",
        microbiology="f1d8d4e9941417f25610a239045c35488d56cf22",
        principles_economics_bundle="cd31beb103fffbc09cc81ebfe117d8c40cc12d1a",
        psychology="de7e40c91813dabdc2875df9d0709fc4f46080bb",
        us_history="c05b860a035ff59a2ca1fd44339ef86694e09b57",
        world_history="b2ddac6d5ab41847257c1484ee9271576d1a053e",
    ),
    *(
        Source(f"GITenberg/{name}", commit, (path,), novel, part)
        for name, commit, path, part in (
            ("A-Tale-of-Two-Cities_98", "0f6111bc7237af7375295ec1754c2e57e19f67f1", "98-0.txt", "train"),
            ("Dracula_345", "5216d6ea255fbf8966426a160b68251b18f16907", "345.txt", "train"),
            ("Great-Expectations_1400", "889db0e100928a957f469bf834c564d04065c8e6", "1400-0.txt", "train"),
            ("Middlemarch_145", "39add53d31f10ba5cecdcbe8c095f90b25fd4b3f", "145.txt", "train"),
            ("Moby-Dick--Or-The-Whale_2701", "bdf1948e6cd00963730971e5624e764a35f238c3", "2701-0.txt", "train"),
            ("Pride-and-Prejudice_1342", "81db45c9c48c592f0b77f01fc59e677ad0a5634e", "1342-0.txt", "train"),
            ("The-Adventures-of-Sherlock-Holmes_1661", "7e5dd2703fbf503c004063e96ab7c61262375e5f", "1661.txt", "train"),
            ("The-Time-Machine_35", "154a5c628743bd7d35d1af0fc4bcc017f0e111e1", "35-0.txt", "tune"),
            (
                "News-from-Nowhere--Or-An-Epoch-of-Rest--13-Being-Some-Chapters-from-a-Utopian-Romance_3261",
                "79bd67b0ae225cd64f7bbc25c0449850b3131069",
                "3261.txt",
                "report",
            ),
        )
    ),
    Source("python/peps", "ba4deeb7969588d937da609008d05bb83a47b1ab", ("peps",), proposal, limit=4_000_000),
    Source("rust-lang/rfcs", "354518a8c9025f40be6f730452c1bfe71a12dc22", ("text",), proposal, limit=3_000_000),
    Source(
        "pytorch/examples",
        "77f55b912142e11fcfdf5b530231fb9c52f181e8",
        ("word_language_model/data/wikitext-2/valid.txt",),
        plain,
        "wikitext2.txt",
    ),
    Source(
        "klosax/hellaswag_text_data",
        "1105d370f8340eac3c63a91fd1fa58e8999f9505",
        ("hellaswag_val_full.txt.bz2",),
        hellaswag,
        "hellaswag.json",
    ),
]


# -- from a repository to its files


def clone(source: Source, folder: Path) -> Path:
    """A clone with the files that are asked for; of the others only the names are fetched."""
    target = folder / source.repository.rpartition("/")[2]
    if not target.exists():
        git = ["git", "-c", "advice.detachedHead=false"]
        url = f"https://github.com/{source.repository}"
        subprocess.run([*git, "clone", "--quiet", "--filter=blob:none", "--no-checkout", url, str(target)], check=True)
        checkout = ["checkout", "--quiet", source.commit, "--", *source.paths]  # fetches them together
        subprocess.run([*git, "-C", str(target), *checkout], check=True)
    return target


def documents(source: Source, folder: Path) -> Iterator[str]:
    """The texts of a source's files, sorted by path; those under 500 characters are left out."""
    if not folder.exists():
        raise SystemExit(f"{folder} is missing: a clone of https://github.com/{source.repository} with {source.commit}")
    archive = ["git", "-C", str(folder.resolve()), "archive", "--format=tar", source.commit, *source.paths]
    done = subprocess.run(archive, check=True, capture_output=True)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as files:
        members = sorted((m for m in files.getmembers() if m.isfile()), key=lambda m: m.name)
        for member in members:
            if member.name.endswith((".cnxml", ".txt", ".rst", ".md", ".bz2")):
                text = source.read(files.extractfile(member).read())  # type: ignore[union-attr]
                if len(text) >= 500:
                    yield text


def build(clones: Path, fetch: bool) -> dict[str, str]:
    """File name -> contents."""
    train: list[str] = []
    held: dict[str, list[str]] = {"tune": [], "report": []}
    files: dict[str, str] = {}
    for source in SOURCES:
        folder = clone(source, clones) if fetch else clones / source.repository.rpartition("/")[2]
        used = 0
        for number, text in enumerate(documents(source, folder)):
            place = number % HELD_OUT_EVERY
            part = source.part or {7: "tune", 17: "report"}.get(place, "train")
            if part == "train" and (source.limit is None or used < source.limit):
                train.append(json.dumps({"source": source.repository, "text": text}, ensure_ascii=False))
                used += len(text)
            elif part in held:
                held[part].append(text)
            elif part != "train":
                files[part] = text
    files["train.jsonl"] = "\n".join(train) + "\n"
    for name, texts in held.items():
        order = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())  # of every source a part
        kept, length = [], 0
        for text in order:
            if length < HELD_OUT_LENGTH:
                kept.append(text[: HELD_OUT_LENGTH // 6])
                length += len(kept[-1])
        files[f"{name}.txt"] = "\n\n\n".join(kept) + "\n"
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--from", dest="clones", type=Path, help="a folder with clones, instead of fetching")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        files = build(args.clones or Path(scratch), fetch=args.clones is None)
    wrong = []
    for name, text in sorted(files.items()):
        data = text.encode("utf-8")
        (args.out / name).write_bytes(data)
        found = hashlib.sha256(data).hexdigest()
        print(f"{name}  {len(data):,} bytes  {found}")
        if SHA256.get(name) != found:
            wrong.append(f"{name}: expected {SHA256.get(name)}")
    if wrong:
        raise SystemExit("These files differ from those the figures were measured on: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
