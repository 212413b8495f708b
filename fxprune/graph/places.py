"""Places: the line of the user's model from which something is called."""

import linecache
import os
import re
import sys
import sysconfig
import traceback
from functools import cache
from types import CodeType, FrameType

import torch
from torch import fx, nn

TORCH = os.path.dirname(torch.__file__) + os.sep
OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep
LIBRARY = sysconfig.get_path("stdlib") + os.sep
PACKAGES = tuple(sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib"))


@cache
def is_users(filename: str) -> bool:
    """Whether a stack frame is the user's, and not that of torch, Python's library or fxprune."""
    if filename.startswith((TORCH, OURS, "<")):
        return False
    return filename.startswith(PACKAGES) or not filename.startswith(LIBRARY)


def is_ours(frame: FrameType) -> bool:
    """Whether a stack frame is fxprune's."""
    return frame.f_code.co_filename.startswith(OURS)


def users_frame(start: CodeType) -> FrameType | None:
    """The innermost frame of the user's model below the function whose code is ``start``."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not start:
        if is_users(frame.f_code.co_filename):
            return frame
        frame = frame.f_back
    return None


@cache
def stack_trace(file: str, line: int, function: str) -> str:
    """One frame of a stack trace, as Python writes it."""
    return f'  File "{file}", line {line}, in {function}\n    {linecache.getline(file, line).strip()}\n'


def write_place(node: fx.Node, start: CodeType) -> None:
    """Let a node know the line of the user's model, below the function whose code is ``start``, that makes it."""
    frame = users_frame(start)
    if frame is not None:
        node.stack_trace = stack_trace(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def describe_error_place(model: nn.Module, error: Exception) -> str:
    """Where in ``model`` an error arose: the part that called last, and the user's line."""
    paths = {id(module): path for path, module in model.named_modules()}
    # Not our own frames: one of them holds the error, and to look at its names makes it hold that for ever.
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if not is_ours(frame)]
    callers = [frame.f_locals.get("self") for frame in frames]
    part = next((caller for caller in reversed(callers) if id(caller) in paths), model)
    name = type(model).__name__
    module = f"module {paths[id(part)]} ({type(part).__name__}) of {name}" if part is not model else name
    lines = [line for line in traceback.extract_tb(error.__traceback__) if is_users(line.filename)]
    return f"{module}, {lines[-1].filename}:{lines[-1].lineno}: `{lines[-1].line}`" if lines else module


def describe_place(node: fx.Node) -> str:
    """A node's name and the line of the user's model that it comes from."""
    frames = re.findall(r'File "(.+)", line (\d+), in .+\n *(.+)', node.stack_trace or "")
    users = [frame for frame in frames if is_users(frame[0])]
    return "{} ({}:{}: `{}`)".format(node.name, *users[-1]) if users else node.name
