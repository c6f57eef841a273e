"""What transformers and PEFT do with the same adapters and prompts, in a process of its own.

    python serving_reference.py JOB.json RESULT.json

Tasks: "adapters" writes random adapters; "answers" answers greedily, one request at a time, for every model;
"static" measures batches that begin and end together, without a server.
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Clock(StoppingCriteria):
    """Notes when each token of a batch is there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def plain_model(folder: str) -> Any:
    """The base in float32; its answers are as long as asked for."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def write_adapters(job: dict[str, Any]) -> dict[str, Any]:
    """Adapters of rank 8 on the seven linear modules of each layer, each with random A and B of its own seed."""
    from tunesmith.models.lora import save_adapter

    # A and B as wide as this give answers unlike the base's and unlike each other's, which PEFT's B of 0 would not.
    config = LoraConfig(r=8, lora_alpha=16, target_modules=list(LINEAR), task_type="CAUSAL_LM")
    model: Any = get_peft_model(plain_model(job["base"]), config)
    for number, folder in enumerate(job["folders"]):
        generator = torch.Generator().manual_seed(1000 + number)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_" in name:
                    weight.normal_(std=job["std"], generator=generator)
        save_adapter(model, Path(folder), job["base_name"])
    return {}


def with_adapters(job: dict[str, Any]) -> Any:
    """The base with every adapter of the job beside it; without any, the base alone."""
    model = plain_model(job["base"])
    for number, (name, folder) in enumerate(job["adapters"].items()):
        if number:
            model.load_adapter(folder, name)
        else:
            model = PeftModel.from_pretrained(model, folder, name)
    return model.eval()


def generate(model: Any, prompts: Sequence[Sequence[int]], tokens: int, **more: Any) -> Any:
    """Greedy tokens after prompts of one length."""
    ids = torch.tensor(prompts)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        return model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=tokens, **more
        )


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """Tokens of each model (key "" is the base) for each prompt, and how near the second choice ever came."""
    found: dict[str, list[dict[str, Any]]] = {}
    model = with_adapters(job)
    for name in ["", *job["adapters"]]:
        if name:
            model.set_adapter(name)
        elif job["adapters"]:
            model.base_model.disable_adapter_layers()
        found[name] = []
        for prompt in job["prompts"]:
            made = generate(model, [prompt], job["tokens"], return_dict_in_generate=True, output_logits=True)
            gaps = [float(row[0].topk(2).values.diff().abs()) for row in made.logits]
            ids = made.sequences[0, len(prompt) :].tolist()
            found[name].append({"ids": ids, "gaps": gaps})
        if not name and job["adapters"]:
            model.base_model.enable_adapter_layers()
    return {"answers": found}


def static(job: dict[str, Any]) -> dict[str, Any]:
    """Requests in batches of ``clients``, in their order; records as of the load test's client."""
    began = time.perf_counter()
    model = with_adapters(job)
    start_seconds = time.perf_counter() - began
    mode, records = job["mode"], []
    requests = job["requests"]
    run_batch(model, mode, requests[: job["clients"]], 2)  # memory and kernels are made on first use
    origin, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(requests), job["clients"]):
        batch = requests[start : start + job["clients"]]
        due = time.perf_counter()
        for times, members in run_batch(model, mode, batch, job["tokens"]):
            records += [
                {"due": due - origin, "sent": due - origin, "ended": times[-1] - origin, "error": None,
                 "times": [at - origin for at in times], "tokens": len(times), "model": member["model"]}
                for member in members
            ]  # fmt: skip
    busy = (time.process_time() - cpu) / (time.perf_counter() - origin)
    return {"records": records, "start_seconds": start_seconds, "cores_busy": busy, "rss_bytes": rss_bytes()}


def run_batch(
    model: Any, mode: str, batch: Sequence[dict[str, Any]], tokens: int
) -> list[tuple[list[float], list[dict[str, Any]]]]:
    """Token times and requests of each call that the batch needs: one, or with set_adapter one a model."""
    groups: list[list[dict[str, Any]]] = [list(batch)]
    if mode == "peft-set-adapter":
        names = dict.fromkeys(request["model"] for request in batch)
        groups = [[request for request in batch if request["model"] == name] for name in names]
    found = []
    for group in groups:
        clock, more = Clock(), {}
        if mode == "peft-set-adapter":
            model.set_adapter(group[0]["model"])
        elif mode == "peft-adapter-names":
            more["adapter_names"] = [request["model"] for request in group]
        prompts = [request["ids"] for request in group]
        generate(model, prompts, tokens, stopping_criteria=StoppingCriteriaList([clock]), **more)
        found.append((clock.times, group))
    return found


def rss_bytes() -> int:
    """Resident memory now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def main() -> None:
    """Do the task of the job."""
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    result = {"adapters": write_adapters, "answers": answers, "static": static}[job["task"]](job)
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
