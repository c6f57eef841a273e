"""A served tiny model for the tests: real weights, a plain engine that reads everything anew for each token."""

import asyncio
import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tiny_models import save_tiny_model, tiny_model
from tunesmith.errors import ModelError
from tunesmith.models.base import BaseFolder
from tunesmith.serving.footprint import Measure
from tunesmith.serving.memory import Base
from tunesmith.serving.registry import Version
from tunesmith.serving.seam import (
    AdapterKey,
    BadRequest,
    Deliver,
    EngineFacts,
    EngineFull,
    EngineLimits,
    Sampling,
    Ticket,
    Token,
    UnknownAdapter,
)
from tunesmith.serving.security import Keys
from tunesmith.serving.server import DrainingServer, bind, build_service
from tunesmith.serving.service import Service

CONTEXT, VOCABULARY = 256, 400  # of tiny_models
LIMITS = EngineLimits(CONTEXT, VOCABULARY, running=4, waiting=8)


def save_base(folder: Path) -> Path:
    """A tiny model whose answers vary; its name is the folder's."""
    return save_tiny_model(folder, tied=False)


def save_adapter(folder: Path, seed: int, *, tokenizer: Any = None) -> Path:
    """An adapter on ``save_base``'s model with random weights, large enough to change every answer."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(tiny_model(tied=False), config)
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def greedy(base: Path, prompt: Sequence[int], count: int, adapter: Path | None = None) -> list[int]:
    """The likeliest tokens after ``prompt`` by transformers and PEFT alone."""
    model: Any = tiny_model(tied=False)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@dataclass(eq=False)
class _Request:
    ticket: Ticket
    ids: list[int]
    adapter: AdapterKey | None
    sampling: Sampling
    deliver: Deliver
    made: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)


class PlainEngine:
    """The seam by plain PEFT, one token of each running request at a time.

    ``gate`` cleared: no tokens are made. ``pause``: seconds before each round of tokens.
    """

    def __init__(self, running: int = 4, waiting: int = 8) -> None:
        self.limits = EngineLimits(CONTEXT, VOCABULARY, running, waiting)
        self.gate = threading.Event()
        self.gate.set()
        self.pause = 0.0
        self.loads: dict[AdapterKey, int] = {}
        self.cancelled: list[int] = []
        self._model: Any = tiny_model(tied=False)
        self._requests: list[_Request] = []
        self._numbers = 0
        self._made = 0
        self._lock, self._closed = threading.RLock(), False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(
        self, prompt: Sequence[int], adapter: AdapterKey | None, sampling: Sampling, deliver: Deliver
    ) -> Ticket:
        with self._lock:
            if not prompt:
                raise BadRequest("the prompt is empty")
            if adapter is not None and adapter not in self.loads:
                raise UnknownAdapter(adapter)
            if len(self._requests) >= self.limits.running + self.limits.waiting:
                raise EngineFull("full")
            self._numbers += 1
            request = _Request(Ticket(self._numbers), list(prompt), adapter, sampling, deliver)
            request.generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
            self._requests.append(request)
            return request.ticket

    def cancel(self, ticket: Ticket) -> None:
        with self._lock:
            before = len(self._requests)
            self._requests = [r for r in self._requests if r.ticket != ticket]
            if len(self._requests) < before:
                self.cancelled.append(ticket.number)

    def load(self, folder: Path) -> AdapterKey:
        content = b"".join(
            (folder / f"adapter_{name}").read_bytes() for name in ("config.json", "model.safetensors")
        )
        key = AdapterKey(hashlib.sha256(content).hexdigest())
        with self._lock:
            try:
                if isinstance(self._model, PeftModel):
                    if key not in self._model.peft_config:
                        self._model.load_adapter(folder, key)
                else:
                    self._model = PeftModel.from_pretrained(self._model, folder, key)
                self._model.eval()
            except Exception as error:
                raise ModelError(
                    str(folder), f"cannot be loaded ({type(error).__name__})", "mend it"
                ) from error
            self.loads[key] = self.loads.get(key, 0) + 1
        return key

    def unload(self, key: AdapterKey) -> None:
        with self._lock:
            if key not in self.loads:
                raise UnknownAdapter(key)
            self.loads[key] -= 1
            if not self.loads[key]:
                del self.loads[key]

    def evict(self) -> None:
        """Put every adapter out of memory, as an engine short of memory may."""
        with self._lock:
            self.loads.clear()

    def facts(self) -> EngineFacts:
        with self._lock:
            running = min(len(self._requests), self.limits.running)
            waiting = len(self._requests) - running
            tokens = sum(len(r.ids) for r in self._requests)
            return EngineFacts(
                running,
                waiting,
                tuple(self.loads),
                0,
                tokens,
                CONTEXT * self.limits.running,
                0,
                0,
                0,
                self._made,
            )

    def close(self) -> None:
        self._closed = True
        self.gate.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._closed:
            self.gate.wait()
            time.sleep(self.pause or 0.0002)
            with self._lock, torch.inference_mode():
                for request in self._requests[: self.limits.running]:
                    self._step(request)
                self._requests = [r for r in self._requests if r.made >= 0]

    def _step(self, request: _Request) -> None:
        model, ids = self._model, torch.tensor([request.ids])
        if not isinstance(model, PeftModel):
            row = model(ids).logits[0, -1]
        elif request.adapter is None:
            with model.disable_adapter():
                row = model(ids).logits[0, -1]
        else:
            model.set_adapter(request.adapter)
            row = model(ids).logits[0, -1]
        told, sampling = row.log_softmax(-1), request.sampling
        for token, value in sampling.logit_bias.items():
            row[token] += value
        token = int(row.argmax()) if sampling.temperature == 0 else self._drawn(row, request)
        request.ids.append(token)
        request.made += 1
        self._made += 1
        finish = "stop" if token in sampling.stop_token_ids else None
        if finish is None and request.made >= sampling.max_tokens:
            finish = "length"
        top = [] if sampling.top_logprobs is None else told.topk(sampling.top_logprobs).indices.tolist()
        logprob = None if sampling.top_logprobs is None else float(told[token])
        request.deliver(Token(token, logprob, tuple((i, float(told[i])) for i in top), finish))
        if finish:
            request.made = -1

    def _drawn(self, row: torch.Tensor, request: _Request) -> int:
        chances, order = (row / request.sampling.temperature).softmax(-1).sort(descending=True)
        kept = chances.cumsum(-1) - chances < request.sampling.top_p
        return int(order[torch.multinomial(chances * kept, 1, generator=request.generator)])


@dataclass
class Served:
    """A server at work in this process."""

    url: str
    service: Service
    engine: Any
    root: Path
    base: Path
    said: list[str]
    server: DrainingServer
    thread: threading.Thread

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, **{"timeout": 30, **more})


def resolve(service: Service, name: str) -> Version:
    """What ``name`` means now, loaded and let go of again."""
    with service.memory.claim() as claim:
        return service.registry.hold(name, claim).result(10)


@contextmanager
def served(
    base: Path,
    root: Path,
    engine: Any = None,
    keys: Keys | None = None,
    grace_seconds: int = 1,
    **settings: Any,
) -> Iterator[Served]:
    """A server of one base on a free port; ``settings`` are attributes of its service."""
    engine = engine or PlainEngine()
    only = Base(base.name, 0, BaseFolder(str(base), base, None), CONTEXT)
    said: list[str] = []
    service = service_of([only], root, lambda _: engine, said.append, keys=keys, limits=engine.limits)
    with running(service, said, base, root, engine, grace_seconds, **settings) as found:
        yield found


def service_of(
    bases: Sequence[Base],
    root: Path | None,
    open_engine: Callable[[BaseFolder], Any],
    say: Callable[[str], None],
    *,
    keys: Keys | None = None,
    limit: int | None = None,
    limits: EngineLimits = LIMITS,
) -> Service:
    """A service with those bases loaded that have room."""
    measure = Measure(limits.running, limits.waiting, CONTEXT, 0)
    return build_service(bases, root, keys or Keys(), say, measure, open_engine, limit)


@contextmanager
def running(
    service: Service,
    said: list[str],
    base: Path,
    root: Path,
    engine: Any = None,
    grace_seconds: int = 1,
    **settings: Any,
) -> Iterator[Served]:
    """A service at work on a free port."""
    for name, value in settings.items():
        setattr(service, name, value)
    server = DrainingServer(service, grace_seconds, said.append)
    listener = bind("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])), daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        yield Served(url, service, engine, root, base, said, server, thread)
    finally:
        server.stop()
        thread.join(10)
        listener.close()
        service.memory.close()


def wait_for(is_so: Callable[[], Any], seconds: float = 10.0) -> None:
    """Until ``is_so()``; fails after ``seconds``."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.005)
