"""Parts of a row in threads of one process, one of which computes at a time; what brings states between them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock
from typing import Any

import torch
from torch import Tensor

from mega_scale.ops.ema import Fade, forget
from mega_scale.ops.timestep_norm import Moments, later_gradients, part_borders

WAIT_S = 300


def run_parts(count: int, act: Callable[[Any, int], Any], make_carry: Any = None) -> list[Any]:
    """What `act(carry, part)` returns for every part; carry is that of `damped_ema`, or `make_carry(exchange, part)`.

    `exchange(part, own)` returns what every part hands in.
    """
    turns, everyone, table = Lock(), Barrier(count), [None] * count

    def meet() -> None:
        turns.release()
        try:
            everyone.wait(WAIT_S)
        finally:
            turns.acquire()

    def exchange(part: int, own: Any) -> list[Any]:
        table[part] = own
        meet()
        found = list(table)
        meet()
        return found

    def carry_of(part: int) -> Any:
        def carry(end: Tensor, fade: Fade, resets: Tensor | None, back: bool) -> Any:
            assert not torch.is_grad_enabled()
            shut = torch.zeros(len(end), 1, dtype=torch.bool) if resets is None else resets
            given = exchange(part, ([end, *(t for t in fade if t is not None)], shut))
            leaves = [[t.detach().clone().requires_grad_() for t in own[0]] for own in given]
            states: list[Any] = [None] * count
            with torch.enable_grad():
                came = 0 * leaves[0][0]
                for i in reversed(range(count)) if back else range(count):
                    (end, *fades), shut = leaves[i], given[i][1]
                    states[i] = came
                    sent = forget(end, shut[:, 0]) if back else end
                    came = sent + forget(Fade(*fades).times(came), shut.any(1))

            def turn(d_state: Tensor) -> Any:
                gradients = exchange(part, d_state)
                found = torch.autograd.grad(
                    states, leaves[part], gradients, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                return found[0], found[1:]

            return states[part].detach(), turn

        return carry

    def run(part: int) -> Any:
        with turns:
            try:
                return act(make_carry(exchange, part) if make_carry else carry_of(part), part)
            except BaseException:
                everyone.abort()
                raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def average_in_parts(
    count: int, probe: dict[str, Tensor], leaves: dict[str, Tensor], average: Callable[..., tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """y, the end state and gradients of a row, from `average(own leaves, carry, slice of tokens)` of its parts.

    The loss weighs y (B, L, D) and the end states, (B, D or 2D, N) or (B, D, N, 2), by probes of those names; gradients
    of all leaves but x are summed over parts.
    """
    length, channels = leaves["x"].shape[1:]

    def act(carry: Any, part: int) -> Any:
        cut = slice(part * length // count, (part + 1) * length // count)
        own = {name: (t[:, cut] if name == "x" else t).detach().clone().requires_grad_() for name, t in leaves.items()}
        y, end = average(own, carry, cut)
        loss = (y * probe["y"][:, cut]).sum()
        # The last part knows the state after the row; the first, in its second half, that before it.
        for at, half in ((count - 1, slice(channels)), (0, slice(channels, None))):
            if part == at:
                loss = loss + (end[:, half] * probe["end"][:, half]).sum()
        return y.detach(), end.detach(), dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))

    found = run_parts(count, act)
    ends = torch.cat([found[-1][1][:, :channels], found[0][1][:, channels:]], 1)
    summed = {"d" + name: sum(part[2][name] for part in found) for name in leaves if name != "x"}
    joined = {"y": torch.cat([part[0] for part in found], 1), "dx": torch.cat([part[2]["x"] for part in found], 1)}
    return joined | summed | {"end": ends}


def carry_moments(exchange: Callable[[int, Any], list[Any]], part: int) -> Any:
    """The carry of `timestep_norm` for one part."""

    def carry(total: Moments, begins: Tensor | None, whole: bool) -> Any:
        assert not torch.is_grad_enabled()
        given = exchange(part, (total, begins))
        totals = Moments(*(torch.stack(t) for t in zip(*(own for own, _ in given), strict=True)))
        flags = None if begins is None else torch.stack([flags for _, flags in given])
        borders = part_borders(totals, flags)

        def turn(d_mean: Tensor, d_var: Tensor) -> Any:
            gradients = (torch.stack(t) for t in zip(*exchange(part, (d_mean, d_var)), strict=True))
            found = later_gradients(part, borders, flags, *gradients)
            return lambda: found

        return lambda: (Moments(*(t[part] for t in borders)), turn)

    return carry
