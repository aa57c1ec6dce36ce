"""TRL's SFT script with LR-QAT: swap `LoraConfig` for `LRQATConfig`, merge, save. The rest is as it was.

python examples/sft.py --dataset trl-lib/Capybara --output out/smollm2-chat-w4
python examples/sft.py --model "$(python examples/smollm2.py)" --dataset gsm8k_train.jsonl.gz --steps 20  # offline
"""

import argparse

from given import chats, tokenizer_of
from trl import SFTConfig, SFTTrainer

from peft_lrqat import LRQATConfig  # 1. was: from peft import LoraConfig

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--dataset", default="trl-lib/Capybara", help='Hub id or .jsonl(.gz) file with chats in "messages"')
parser.add_argument("--output", default="out/sft")
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--group-size", type=int, default=64, help="128 is usual; SmolLM2's 576 features need a divisor")
parser.add_argument("--steps", type=int, default=-1, help="-1: three epochs")
parser.add_argument("--batch-size", type=int, default=4)
parser.add_argument("--max-length", type=int, default=512)
parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast, for GPUs")


def prompt_and_completion(example: dict) -> dict:
    """The last answer is what is learned; TRL takes no loss on prompts."""
    return {"prompt": example["messages"][:-1], "completion": example["messages"][-1:]}


def main(argv: list[str] | None = None) -> None:
    args = parser.parse_args(argv)
    try:
        dataset, processing_class = chats(args.dataset), tokenizer_of(args.model, for_chats=True)
    except ValueError as error:
        parser.error(str(error))

    trainer = SFTTrainer(
        model=args.model,
        args=SFTConfig(
            output_dir=f"{args.output}-adapter",
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            max_length=args.max_length,
            learning_rate=1e-3,
            bf16=args.bf16,
            logging_steps=1,
        ),
        train_dataset=dataset.map(prompt_and_completion, remove_columns=dataset.column_names),
        processing_class=processing_class,
        peft_config=LRQATConfig(  # 2. was: LoraConfig(
            bits=args.bits,
            group_size=args.group_size,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    trainer.train()
    trainer.save_model()  # the adapter, to go on from

    merged = trainer.model.merge_and_unload()  # 3. as with LoRA, but the result is quantized
    merged.save_pretrained(args.output)
    processing_class.save_pretrained(args.output)
    print(f"vllm serve {args.output}")


if __name__ == "__main__":
    main()
