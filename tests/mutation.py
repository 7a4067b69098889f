"""Mutants of a file of the library, and whether the tests notice them.

    python tests/mutation.py lie_metric/jacobian/carrying.py --tests tests/jacobian --sample 60 --seed 0

Each mutant is one small change, made in a copy of the library from which the given tests are run. What survives is a
hole in the tests, or a change that changes nothing. No part of the test suite.
"""

import argparse
import ast
import contextlib
import copy
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.MatMult: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


def changes(node):
    """The changes that can be made of a node, each as what takes its place; None for a statement that goes."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            if type(operator) in COMPARISONS:
                changed = copy.deepcopy(node)
                changed.ops[index] = COMPARISONS[type(operator)]()
                yield changed
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
        for index in range(len(node.values)):
            rest = node.values[:index] + node.values[index + 1 :]
            yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(-node.value if node.value else -1)
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        changed = copy.copy(node)
        changed.test = ast.UnaryOp(ast.Not(), node.test)
        yield changed
    elif isinstance(node, ast.Call) and not (isinstance(node.func, ast.Name) and node.func.id == "isinstance"):
        for index, argument in enumerate(node.args):
            if not isinstance(argument, ast.Starred) and len(node.args) > 1:
                yield ast.Call(node.func, node.args[:index] + node.args[index + 1 :], node.keywords)
        for index in range(len(node.keywords)):
            yield ast.Call(node.func, node.args, node.keywords[:index] + node.keywords[index + 1 :])
    elif isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(None)
    elif isinstance(node, (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Continue, ast.Break)):
        yield None


class _Replace(ast.NodeTransformer):
    def __init__(self, old, new):
        self.old, self.new = old, ast.Pass() if new is None else new

    def visit(self, node):
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def _passed_over(tree):
    """Nodes that do nothing when the program runs as it should: docstrings, annotations, messages, `__all__`."""
    skipped = set()
    for node in ast.walk(tree):
        parts = []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            parts = [*node.exc.args, *node.exc.keywords]
        elif isinstance(node, (ast.AnnAssign, ast.arg)) and node.annotation:
            parts = [node.annotation]
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            parts = [*filter(None, [node.returns]), *node.decorator_list]
        elif isinstance(node, ast.JoinedStr) or _says_nothing(node):
            parts = [node]
        for part in parts:
            skipped.update(map(id, ast.walk(part)))
    return skipped


def _says_nothing(node):
    docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    names = isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    cast = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cast"
    return docstring or names or cast


def mutants(source):
    """Every mutant of a source: line, the words before, the words after, and the source."""
    tree = ast.parse(source)
    skipped = _passed_over(tree)
    found = []
    for place, node in enumerate(ast.walk(tree)):
        if id(node) in skipped or not hasattr(node, "lineno"):
            continue
        for number, changed in enumerate(changes(node)):
            before = ast.unparse(node).split("\n")[0]
            after = "pass" if changed is None else ast.unparse(ast.fix_missing_locations(changed)).split("\n")[0]
            found.append((node.lineno, before, after, place, number))
    return found


def mutated(source, place, number):
    """The source of a mutant, by its place in the tree and the number of the change there."""
    tree = ast.parse(source)
    node = next(node for index, node in enumerate(ast.walk(tree)) if index == place)
    changed = list(changes(node))[number]
    return ast.unparse(ast.fix_missing_locations(_Replace(node, changed).visit(tree)))


# What the library and its tests import and what takes long: imported once, and there in every process that is forked.
WARM = (
    "torch", "torchvision", "torchmetrics", "lightning", "scipy.stats", "matplotlib.pyplot", "hypothesis", "timm",
    "torch._dynamo", "torch.func",
)  # fmt: skip


def warm_up():
    """Imports what every run needs, the library not among it."""
    import importlib

    for name in WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # threads would not outlive the fork
    gc.freeze()


def passes(folder, tests, seconds):
    """Whether the tests pass with the library in a folder, in a process of their own; and what they said."""
    said = Path(folder) / "said"
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.setpgid(0, 0)  # with all that the tests start
            out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(folder)
            os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
            sys.path.insert(0, str(folder))
            sys.dont_write_bytecode = True
            import pytest

            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0, said.read_text()
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False, "out of time"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="relative to the root of the repository")
    parser.add_argument("--tests", nargs="+", default=["tests"])
    parser.add_argument("--select", default="", help="which of the tests, as by `pytest -k`")
    parser.add_argument("--sample", type=int, default=60, help="how many mutants; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=int, nargs="*", help="mutants of these lines alone, of those in the sample")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a mutant counts as killed")
    parser.add_argument("--list", action="store_true", help="list the mutants and run nothing")
    asked = parser.parse_args()
    source = (ROOT / asked.file).read_text()
    found = mutants(source)
    if asked.sample and asked.sample < len(found):
        found = sorted(random.Random(asked.seed).sample(found, asked.sample))
    if asked.lines:
        found = [mutant for mutant in found if mutant[0] in asked.lines]
    if asked.list:
        for line, before, after, *_ in found:
            print(f"{line}: {before}  ->  {after}")
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in ("lie_metric", "tests", "pyproject.toml", "examples"):
            path = ROOT / name
            (shutil.copytree if path.is_dir() else shutil.copy)(path, Path(folder) / name)
        target = Path(folder) / asked.file
        warm_up()
        tests = [*asked.tests, *(["-k", asked.select] if asked.select else [])]
        begin = time.monotonic()
        sound, said = passes(folder, tests, asked.timeout)
        assert sound, f"the tests have to pass without a mutation\n{said}"
        # What takes this much longer has not ended because of the mutation.
        limit = min(asked.timeout, 20 + 5 * (time.monotonic() - begin))
        killed = 0
        for line, before, after, place, number in found:
            target.write_text(mutated(source, place, number))
            survived, said = passes(folder, tests, limit)
            killed += not survived
            by = next((words for words in said.split("\n") if words.startswith(("FAILED", "ERROR", "out of"))), "")
            print(f"{'SURVIVED' if survived else 'killed  '} {line}: {before}  ->  {after}    {by[:90]}", flush=True)
        print(f"{killed} of {len(found)} killed ({killed / len(found):.0%})")


if __name__ == "__main__":
    main()
