"""Documents of a packed row, each run alone by a model that has no chunks and knows of no documents.

A document that begins at place s of a chunk has its chunk borders where the row has them. Alone, it is given in pieces
that end there: the moving average goes on from piece to piece, keys and values of earlier pieces are taken away.
"""

import torch
from torch import Tensor

from mega_scale.model import MegaConfig, MegaForCausalLM
from mega_scale.model.cache import LayerState, MegaCache

CHUNK = 8
LENGTH = 64
# Where documents start in rows: on borders of chunks and of ranks (32 of two, 16 and 48 of four), before and after
# them; of one token; a row of one document; one that goes on with a document; and several in one chunk.
STARTS = [
    [0, 8, 16, 32, 48, 56],
    [0, 7, 15, 31, 47],
    [0, 9, 17, 33, 34, 49],
    [0],
    [60],
    [3, 4, 6, 13, 14, 30, 37, 39],
]


def spans(starts: list[int], length: int = LENGTH) -> list[tuple[int, int]]:
    """Documents of a row: first place, and the place after the last."""
    return [(a, b) for a, b in zip([0, *starts], [*starts, length], strict=True) if a < b]


def packed() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, next tokens with -100 where a document ends, and where documents start: (B, L) each."""
    tokens = torch.randint(3, 60, (len(STARTS), LENGTH + 1), generator=torch.Generator().manual_seed(8))
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, places in zip(starts, STARTS, strict=True):
        row[places] = True
    labels = tokens[:, 1:].masked_fill(starts[:, 1:], -100)
    return tokens[:, :-1].contiguous(), labels, starts[:, :-1].contiguous()


def without_chunks(config: MegaConfig, weights: dict[str, Tensor]) -> MegaForCausalLM:
    """The same model without chunks; `max_positions` is the chunk, so that a simple bias has the same centre."""
    assert config.chunk_size == config.max_positions == CHUNK
    settings = {name: getattr(config, name) for name in MegaConfig.__annotations__ if hasattr(config, name)}
    model = MegaForCausalLM(MegaConfig(**(settings | {"use_chunking": False}))).eval()
    # What is tied is given under one of its names, and a buffer that nothing reads perhaps not at all.
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(name == "lm_head.weight" or name.endswith("_float_tensor") for name in missing)
    return model


def run_alone(model: MegaForCausalLM, tokens: Tensor, begin: int) -> Tensor:
    """Logits (n, V) of a document (n,) that begins at place `begin` of its row."""
    cache, logits, place = MegaCache(model.config.num_hidden_layers), [], 0
    while place < len(tokens):
        piece = tokens[None, place : place + CHUNK - (begin + place) % CHUNK]
        logits.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0])
        place += piece.shape[1]
        for layer in cache.states:
            assert layer.state is not None
            state = layer.state
            layer.state = LayerState(state.ema, state.keys[:, :0], state.values[:, :0], 0)
    return torch.cat(logits)


def all_alone(model: MegaForCausalLM) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits (B, L, V) of every document of `packed` alone, the mean loss of all, and its gradients by name."""
    tokens, labels, _ = packed()
    rows = []
    for row, starts in zip(tokens, STARTS, strict=True):
        rows.append(torch.cat([run_alone(model, row[a:b], a) for a, b in spans(starts)]))
    logits = torch.stack(rows)
    # Tokens of a document and the next ones of the same.
    losses = [
        torch.nn.functional.cross_entropy(logits[i, a : b - 1], tokens[i, a + 1 : b], reduction="sum")
        for i, starts in enumerate(STARTS)
        for a, b in spans(starts)
        if b - a > 1
    ]
    last = torch.nn.functional.cross_entropy(logits[:, -1], labels[:, -1], reduction="sum")
    loss = (sum(losses) + last) / (labels != -100).sum()
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), loss.detach(), gradients
