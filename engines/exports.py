"""Make what `matrix.py` serves: checkpoints (`checkpoints.py`), each exported in the formats that are asked for.

    python exports.py FOLDER JOB.json SPEC=FORMAT ...

Every export is made anew. JOB.json gets the token ids of the prompts and of the text for perplexity.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from checkpoints import held_out, make
from specs import CHATS, COMPLETIONS, EXPORTED, SPECS
from transformers import AutoTokenizer

from peft_lrqat import export

SPEC = {spec.name: spec for spec in (*SPECS, *EXPORTED)}


def main(folder: Path, job: Path, pairs: list[str]) -> None:
    for pair in pairs:
        name, format = pair.split("=")
        merged = folder / name
        if not (merged / "tokenizer.json").exists():
            make(SPEC[name], merged)
        print(export(merged, folder / f"{name}-{format}", format, tokenizer=merged, overwrite=True), flush=True)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    prompts = [tokenizer(text)["input_ids"] for text in COMPLETIONS]
    for text in CHATS:
        message = [{"role": "user", "content": text}]
        prompts.append(
            tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
    found = {"prompts": prompts, "text": held_out(tokenizer), "ends": [tokenizer.eos_token_id]}
    job.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
