"""English to train and to measure on, from public repositories at fixed commits; checked by hash, never committed here.

    python benchmarks/text.py --out text/                    clones what it needs (about 60 MB), a few minutes
    python benchmarks/text.py --out text/ --from CLONES/     reads clones that are there: CLONES/<repository's name>
    python benchmarks/text.py --out text/ --set pretrain     64 million tokens, for one pass

The first set is for fine-tuning: `train.jsonl` (one document a line: source, text), and for measuring `tune.txt`
(settings are chosen on it), `report.txt` (figures are told of it), `wikitext2.txt` (WikiText-2's validation split) and
`hellaswag.json`. `tune` and `report` are documents that `train` does not have: of textbooks and proposals every
twentieth each, of novels one each.

The other, `--set pretrain`, has these documents and manuals, enough to train a small model on in one pass:
`train.jsonl`, `held-out.jsonl` (every sixtieth document) and `wikitext2.txt`. No paragraph of 80 characters or more is
there twice, in whichever file, nor are documents that begin alike.

Textbooks are OpenStax's (Creative Commons, most of them non-commercial), novels Project Gutenberg's, Microsoft's
manuals Creative Commons Attribution 4.0, and the rest is the Python Enhancement Proposals, Rust's RFCs, Ethereum's and
Bitcoin's proposals: their licences are their own.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

#: sha256 of what is written.
SHA256 = {
    "finetune": {
        "hellaswag.json": "8435df6f6f806612ee6e8328877ddf79d42bc67c0589af34038aeef8b2525685",
        "report.txt": "4fc194edbdf4fbb286ec4f51f6350a03c45a283f8c9515774b385069bb2367e4",
        "train.jsonl": "7960aa0e2b8b9e55b2deeba1afedac3eadfb62fd63f6db6b041470e2a131e0b5",
        "tune.txt": "0505e53bc3baf3ce179344f833028f06cde3c702b43c58bfbc0f80c5d44d7536",
        "wikitext2.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    },
    "pretrain": {
        "held-out.jsonl": "72bb22ab2bee5729b030d03136907f75888fcbc3e2be72b4f375fa2834882f9a",
        "train.jsonl": "abc123811e69cfe358e0d55e615874cdb8548985da1d6c68216d870d2cde3d12",
        "wikitext2.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    },
}

#: Characters that a document of the set for pre-training has at least.
SHORTEST = 1000

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


def page(data: bytes) -> str:
    """A page of a manual in Markdown, without the YAML in front, comments and the targets of links; code stays."""
    text = data.decode("utf-8-sig", errors="replace").replace("\r\n", "\n")
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    return re.sub(r"(\[[^\[\]\n]*\])\([^()\s]*\)", r"\1", text).strip()


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

#: What the set for pre-training has besides.
MANUALS = [
    *_textbooks(
        american_government="a2677245241954039c7ebc996e82a8f3b0b4376f",
        business_ethics="eab8fda2d77e50a10cc33bd676177e1e72f363d7",
        business_law="0502c9f293fdb7745b76c4d7855d49acdaf8098b",
        calculus_bundle="8dbc2ce19e804924b2517b89ac72ee45be949d15",
        chemistry_bundle="3be4b60ff501f29a445f0cacf003e5f5cc16244d",
        college_physics_bundle="fd1b25dfd5d8c6580c6e2b2b34a19e29cc69ada9",
        college_success_bundle="4c04b87eb2753872c2d442fe9736859ddb27bb72",
        contemporary_mathematics="6458acc5d4537aecaf2639ef787a65c8e548fed0",
        entrepreneurship="7b0bfdd3d718647b0980f7b425a5c1cc4ced4ed1",
        introduction_business="78c9e7ad4e581d4ff98e78ea30214840e1fa7e1e",
        introduction_intellectual_property="be76c2d982080df077b6f7f7f784d0bbbc37ee8b",
        introductory_statistics_bundle="1f6a35825395bb4aa2834cf1eca37512655f920c",
        organic_chemistry="93b8bef22b8e4c712b638a16b66ab7f53057077f",
        principles_accounting_bundle="2165bf6454c0279c1284e19ac7febc101f7956ad",
        principles_finance="1deb7fd66b614b21ad645ab181cb6eb940d01a3a",
        principles_marketing="a6d7372579d13e0a733954953c4613867f018a48",
        university_physics_bundle="d0ed34a5851119a42e3d972dfc0ff49e4663977c",
        writing_guide="36dc5399701580fcdbd0870cc4c11afba8301527",
    ),
    Source("ethereum/EIPs", "f767a1e8078e17c9b381a91d35a09492189ede1b", ("EIPS",), page),
    Source("bitcoin/bips", "7fe0b034ec967b52a5a28276419117326df93263", (".",), page),
    Source("rust-lang/book", "917544888a55e4da7109bdba8c88c893c0da70f4", ("src",), page),
    *(
        Source(f"MicrosoftDocs/{name}", commit, (path,), page, limit=limit)
        for name, commit, path, limit in (
            ("cpp-docs", "a2e592a8fc391b6aff8d1323f5b58696abdc5d57", "docs", 30_000_000),
            ("PowerShell-Docs", "27138b21b41de3e2b43cfcac4a56861ca419d5eb", "reference", None),
            ("windows-driver-docs", "825aa15f476fc33a3e80abd3db387b025771f6f8", "windows-driver-docs-pr", 30_000_000),
            ("biztalk-docs", "f6e8598c9730805467425037e0887ddfef575982", ".", 20_000_000),
            ("VBA-Docs", "b2cda886ea91e36c62eb1cb177133ad024ecd345", ".", None),
            ("iis-docs", "63b689f03dea4704aaa6a7c17dd42a899a1d4bc7", "iis", None),
            ("office-developer-client-docs", "eedbd61ca40689e7cfed5e1cfd9440a9dc3ab7a5", "docs", None),
            ("win32", "47e64c189dcb1c1a42c221380ccf0ec81cc82d4b", "desktop-src", 60_000_000),
        )
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
    git = ["git", "-C", str(folder.resolve())]
    listed = subprocess.run(
        [*git, "ls-tree", "-r", "-z", source.commit, "--", *source.paths], check=True, capture_output=True
    )
    entries = [entry.partition("\t") for entry in listed.stdout.decode().split("\0") if entry]
    blobs = {path: kind.split()[2] for kind, _, path in entries if kind.startswith("100")}
    with subprocess.Popen([*git, "cat-file", "--batch"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
        for path in sorted(blobs):
            if not path.endswith((".cnxml", ".txt", ".rst", ".md", ".mediawiki", ".bz2")):
                continue
            reader.stdin.write(f"{blobs[path]}\n".encode())  # type: ignore[union-attr]
            reader.stdin.flush()  # type: ignore[union-attr]
            size = int(reader.stdout.readline().split()[2])  # type: ignore[union-attr]
            text = source.read(reader.stdout.read(size + 1)[:-1])  # type: ignore[union-attr]
            if len(text) >= 500:
                yield text


def opened(source: Source, clones: Path, fetch: bool) -> Path:
    return clone(source, clones) if fetch else clones / source.repository.rpartition("/")[2]


def finetuning(clones: Path, fetch: bool) -> dict[str, str]:
    """File name -> contents."""
    train: list[str] = []
    held: dict[str, list[str]] = {"tune": [], "report": []}
    files: dict[str, str] = {}
    for source in SOURCES:
        used = 0
        for number, text in enumerate(documents(source, opened(source, clones, fetch))):
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


class Seen:
    """What a collection has already: whole paragraphs, and the beginnings of documents."""

    def __init__(self) -> None:
        self.paragraphs: set[int] = set()
        self.beginnings: set[str] = set()

    def new(self, text: str) -> str | None:
        """`text` without the long paragraphs that were seen; None if little is left, or it begins as another does."""
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            if len(paragraph) >= 80:
                key = hash(paragraph)
                if key in self.paragraphs:
                    continue
                self.paragraphs.add(key)
            kept.append(paragraph)
        text = "\n\n".join(kept)
        beginning = re.sub(r"[^a-z]", "", text[:1000].lower())[:200]
        if len(text) < SHORTEST or beginning in self.beginnings:
            return None
        self.beginnings.add(beginning)
        return text


def pretraining(clones: Path, fetch: bool) -> dict[str, str]:
    """File name -> contents."""
    parts: dict[str, list[str]] = {"train": [], "held-out": []}
    files: dict[str, str] = {}
    seen, number = Seen(), 0
    for source in [*SOURCES, *MANUALS]:
        used = 0
        for document in documents(source, opened(source, clones, fetch)):
            if source.part in ("hellaswag.json", "wikitext2.txt"):
                files[source.part] = document
                continue
            if used >= (source.limit or math.inf):
                break
            text = seen.new(document)
            if text is None:
                continue
            used += len(text)
            number += 1
            line = json.dumps({"source": source.repository, "text": text}, ensure_ascii=False)
            parts["held-out" if number % 60 == 0 else "train"].append(line)
        print(f"{source.repository}: {used:,} characters", flush=True)
    del files["hellaswag.json"]
    return {**files, **{f"{name}.jsonl": "\n".join(lines) + "\n" for name, lines in parts.items()}}


SETS = {"finetune": finetuning, "pretrain": pretraining}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", choices=list(SETS), default="finetune")
    parser.add_argument("--from", dest="clones", type=Path, help="a folder with clones, instead of fetching")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        files = SETS[args.set](args.clones or Path(scratch), args.clones is None)
    wrong = []
    for name, text in sorted(files.items()):
        data = text.encode("utf-8")
        (args.out / name).write_bytes(data)
        found = hashlib.sha256(data).hexdigest()
        print(f"{name}  {len(data):,} bytes  {found}")
        if SHA256[args.set].get(name) != found:
            wrong.append(f"{name}: expected {SHA256[args.set].get(name)}")
    if wrong:
        raise SystemExit("These files differ from those the figures were measured on: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
