"""Files that somebody wrote to run code, or to bring a reader down: each makes a marker file if its code ever runs."""

import io
import json
import os
import pickle
import struct
import subprocess
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch


class _Calls:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._call


def _code(marker: Path) -> str:
    return f"open({str(marker)!r}, 'w').close()"


def _torch(value: Any, **settings: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **settings)
    return file.getvalue()


def _numpy(marker: Path, save: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    save(file, np.array([_Calls(exec, _code(marker))], dtype=object))
    return file.getvalue()


def _zip(marker: Path) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Calls(exec, _code(marker))))
        archive.writestr("../../../escaped", "x")
    return file.getvalue()


def _safetensors(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


def _entry(begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


def _touch(marker: Path) -> str:
    return f"touch {marker}"


ANYWHERE: dict[str, Callable[[Path], bytes]] = {
    "pickle, os.system, protocol 0": lambda m: pickle.dumps(_Calls(os.system, _touch(m)), 0),
    "pickle, eval, protocol 1": lambda m: pickle.dumps(_Calls(eval, _code(m)), 1),
    "pickle, exec, protocol 2": lambda m: pickle.dumps(_Calls(exec, _code(m)), 2),
    "pickle, subprocess, protocol 3": lambda m: pickle.dumps(_Calls(subprocess.call, ["touch", str(m)]), 3),
    "pickle, method of a path, protocol 4": lambda m: pickle.dumps(_Calls(Path.touch, m), 4),
    "pickle, nested, protocol 5": lambda m: pickle.dumps({"weight": [({"x": _Calls(exec, _code(m))},)]}, 5),
    "pickle, partial": lambda m: pickle.dumps(_Calls(partial(exec, _code(m)))),
    "pickle by hand": lambda m: f"cos\nsystem\n(S'{_touch(m)}'\ntR.".encode(),
    "torch.save": lambda m: _torch({"weight": _Calls(exec, _code(m))}),
    "torch.save, old format": lambda m: _torch(_Calls(exec, _code(m)), _use_new_zipfile_serialization=False),
    "zip with a pickle": _zip,
    "numpy array of objects": lambda m: _numpy(m, np.save),
    "numpy archive of objects": lambda m: _numpy(m, np.savez),
    "YAML, call": lambda m: f"!!python/object/apply:os.system ['{_touch(m)}']\n".encode(),
    "YAML, object": lambda m: f"run_dir: !!python/object/new:subprocess.Popen [[touch, '{m}']]\n".encode(),
    "YAML, name": lambda m: b"run_dir: !!python/name:os.system ''\ntrain: !!python/module:subprocess ''\n",
    "YAML, alias bomb": lambda m: (
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    ).encode(),
    "YAML, key that is a list": lambda m: b"? [a, b]\n: c\n",
    "JSON, classes": lambda m: json.dumps(
        {"__class__": "os.system", "py/object": "os.system", "__reduce__": ["os.system", [_touch(m)]], "step": 3}
    ).encode(),
    "JSON, custom code": lambda m: json.dumps(
        {"auto_map": dict.fromkeys(("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"), "evil.Evil")}
        | {"model_type": "evil", "tokenizer_class": "Evil"}
    ).encode(),
    "JSON, nested deeply": lambda m: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "JSON, huge number": lambda m: b'{"step": ' + b"9" * 10_000 + b"}",
    "JSON, infinite number": lambda m: b'{"step": 1e999, "tokens": NaN, "format": 1}',
    "safetensors, huge header": lambda m: _safetensors(b"{}", length=2**63),
    "safetensors, header beyond the end": lambda m: _safetensors(b"{}", length=10**6),
    "safetensors, overlapping": lambda m: _safetensors(
        json.dumps({"a": _entry(0, 16), "cpu": _entry(8, 24)}).encode(), bytes(24)
    ),
    "safetensors, key given twice": lambda m: _safetensors(
        b'{"cpu":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"cpu":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}',
        bytes(9),
    ),
    "safetensors, huge shape": lambda m: _safetensors(
        b'{"cpu":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}', bytes(4)
    ),
    "safetensors, nested deeply": lambda m: _safetensors(b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
    "safetensors, other tensors": lambda m: _safetensors(json.dumps({"cpu": _entry(0, 16)}).encode(), bytes(16)),
    "Python": lambda m: f"{_code(m)}\n".encode(),
    "shell": lambda m: f"#!/bin/sh\n{_touch(m)}\n".encode(),
    "template": lambda m: (
        (
            "{{ cycler.__init__.__globals__.os.system('%s') }}" % _touch(m)  # noqa: UP031  braces belong to it
        ).encode()
    ),
    "nothing": lambda m: b"",
    "zeros": lambda m: bytes(10_000),
}


def _json(edit: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        values = json.loads(content)
        edit(values)
        return json.dumps(values).encode()

    return change


def _runs(edit: Callable[[list[int]], Any]) -> Callable[[bytes], bytes]:
    """Of every parameter's ranges."""
    return _json(lambda values: [edit(run) for runs in values["runs"].values() for run in runs])


_CODE = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "evil.Evil")}
_TOKENIZER_CODE = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}

# Right in form but for one thing: which file, and what becomes of its content.
AIMED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "model with code": ("model/config.json", _json(lambda v: v.update(_CODE))),
    "model of another type with code": ("model/config.json", _json(lambda v: v.update(_CODE, model_type="evil"))),
    "model with impossible sizes": ("model/config.json", _json(lambda v: v.update(hidden_size=10**30))),
    "model with a list for a size": ("model/config.json", _json(lambda v: v.update(hidden_size=[1]))),
    "tokenizer with code": ("model/tokenizer_config.json", _json(lambda v: v.update(_TOKENIZER_CODE))),
    "tokenizer with code elsewhere": (
        "model/tokenizer_config.json",
        _json(lambda v: v.update(auto_map={"AutoTokenizer": ["someone/evil--evil.Evil", None]}, tokenizer_class="E")),
    ),
    "tokenizer of a path": ("model/tokenizer_config.json", _json(lambda v: v.update(tokenizer_class="../../evil"))),
    "step that is text": ("trainer.json", _json(lambda v: v.update(step="6"))),
    "step below zero": ("trainer.json", _json(lambda v: v.update(step=-6))),
    "no step": ("trainer.json", _json(lambda v: v.pop("step"))),
    "data that is a list": ("trainer.json", _json(lambda v: v.update(data=[]))),
    "cut over a billion ranks": ("state/index.json", _json(lambda v: v.update(tp=10**9))),
    "cut over none": ("state/index.json", _json(lambda v: v.update(tp=0))),
    "huge step": ("state/index.json", _json(lambda v: v.update(optimizer_steps=10**30))),
    "step that is no number": ("state/index.json", _json(lambda v: v.update(optimizer_steps=float("nan")))),
    "ranges beyond the file": ("state/index.json", _runs(lambda run: run.__setitem__(3, 10**12))),
    "ranges below zero": ("state/index.json", _runs(lambda run: run.__setitem__(2, -5))),
    "ranges without end": ("state/index.json", _runs(lambda run: run.__setitem__(slice(4, None), [10**12, 0, 1]))),
    "part that is missing": ("state/index.json", _runs(lambda run: run.__setitem__(1, run[1] + 1))),
    "parameter that is missing": ("state/index.json", _json(lambda v: v["shapes"].popitem())),
    "buffer that is missing": ("state/index.json", _json(lambda v: v.update(buffers=["../../etc/passwd"]))),
    "names of a path": (
        "state/index.json",
        _json(lambda v: v["table"].update({"../../evil": v["table"].popitem()[1]})),
    ),
}


def evil_module(marker: Path) -> str:
    """What `auto_map` names."""
    return f"{_code(marker)}\nclass Evil:\n    pass\n"
