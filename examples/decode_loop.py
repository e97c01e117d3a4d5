"""Decoding with continuous batching over the MoE layers of a checkpoint, one Ray actor a rank:
moe-dist demo-checkpoint demo && python examples/decode_loop.py demo 2"""

import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from moe_dist import MoEStack, StepGraph, join_actors, load_layer
from moe_dist.checkpoint import read_config
from moe_dist.runtime.cluster import connect

TIMEOUT_S, VOCABULARY = 120.0, 1000  # the one bounds every wait
BUCKETS = (1, 4, 16)  # of tokens a rank in a step; the largest is also the most requests that a rank runs at once


@dataclass
class Request:
    number: int
    tokens: list[int]  # the prompt, then what was sampled
    length: int  # of both together, when it leaves
    arrives: int = 0  # before which step
    fed: int = 0  # so many of its tokens went through the layers


@ray.remote
class Rank:  # around the layers a toy: random embedding and head, and a state of each request instead of attention
    def load(self, folder):  # `comm` comes from join_actors
        layers = [load_layer(folder, layer, comm=self.comm) for layer in read_config(folder).moe_layers]
        self.stack, spec, self.device = MoEStack(layers), layers[0].plan.spec, self.comm.device
        drawn = torch.randn(2, VOCABULARY, spec.hidden, generator=torch.Generator().manual_seed(0))
        self.embedding_VH, self.head_VH = drawn.to(self.device, spec.torch_dtype)
        self.places, self.states_TH = {}, torch.zeros_like(self.embedding_VH[:1])  # the last row is for who is new
        sizes = BUCKETS if self.stack.capturable.ok else ()
        self.graphs = {size: StepGraph(self.stack, size, self.embedding_VH[:size]) for size in sizes}

    def step(self, work, bucket):  # a token of each request, by its number, to the next one of each
        places = [self.places.get(number, -1) for number in work]
        places, tokens = torch.tensor([places, list(work.values())], dtype=torch.long, device=self.device)
        x_TH = self.embedding_VH[tokens] + self.states_TH[places]
        x_TH = torch.nn.functional.rms_norm(x_TH, x_TH.shape[1:])
        y_TH = self.graphs[bucket](x_TH) if self.graphs else self.stack(x_TH, max_tokens_per_rank=bucket)
        self.states_TH = torch.cat([y_TH, torch.zeros_like(self.states_TH[:1])])
        self.places = {number: place for place, number in enumerate(work)}  # who has left is forgotten
        return (y_TH @ self.head_VH.T).argmax(1).tolist()


def start(folder, ranks):
    actors = [Rank.options(num_cpus=0.25, num_gpus=int(torch.cuda.is_available())).remote() for _ in range(ranks)]
    join_actors(actors, timeout_s=TIMEOUT_S)
    ray.get([actor.load.remote(str(Path(folder).absolute())) for actor in actors], timeout=TIMEOUT_S)
    return actors


def decode(actors, requests):
    waiting, running, steps = deque(sorted(requests, key=lambda each: each.arrives)), [[] for _ in actors], 0
    while waiting or any(running):
        while waiting and waiting[0].arrives <= steps and len(least := min(running, key=len)) < BUCKETS[-1]:
            least.append(waiting.popleft())
        bucket = next(size for size in BUCKETS if size >= max(map(len, running)))
        work = [{each.number: each.tokens[each.fed] for each in own} for own in running]
        sampled = [actor.step.remote(own, bucket) for actor, own in zip(actors, work, strict=True)]
        for own, tokens in zip(running, ray.get(sampled, timeout=TIMEOUT_S), strict=True):
            for each, token in zip(own, tokens, strict=True):
                each.fed += 1
                each.tokens += [token] if each.fed == len(each.tokens) else []
            own[:] = [each for each in own if len(each.tokens) < each.length]
        steps += 1
    return steps


if __name__ == "__main__":
    connect()  # a cluster of RAY_ADDRESS or a new one; a program that has one leaves this out
    requests = [Request(n, [n, 7, 9][: 1 + n % 3], length=4 + 5 * n % 17, arrives=n // 4) for n in range(40)]
    steps = decode(start(sys.argv[1], int(sys.argv[2])), requests)
    print(f"{steps} steps", *(f"{each.number}: {each.tokens}" for each in requests), sep="\n")
