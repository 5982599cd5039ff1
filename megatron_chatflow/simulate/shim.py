"""Compiles and loads ``csrc/simulate/guard.cpp``, the part of a simulated GPU that is C++.

It is compiled on first use against the installed torch and kept in the user's cache folder under a
name that contains torch's version and a hash of the source, of torch's build and of its place.
Processes that need it at the same time each compile it for themselves, and the last one's file
stays: a file is complete as soon as it has its name.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version

from megatron_chatflow.errors import UserError

# torch keeps none of the interfaces stable that stand for a GPU here: the hooks and the guard of
# its C++ code, tensors without values, the fake process group. These versions are tested.
OLDEST_TORCH = (2, 6)
NEWEST_TORCH = (2, 14)

# In a checkout a link to csrc/simulate, in an installation a copy.
_SOURCE = Path(__file__).with_name("guard.cpp")
_COMPILERS = ("c++", "g++", "clang++")


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megatron_chatflow" / "simulate"


def _compiler() -> str:
    named = os.environ.get("CXX")
    for name in (named,) if named else _COMPILERS:
        found = shutil.which(name)
        if found is not None:
            return found
    wanted = f"CXX={named}" if named else " or ".join(_COMPILERS)
    raise UserError(
        f"--simulate: no C++ compiler was found ({wanted}); the simulation compiles a small "
        "library once for each version of torch: install g++, or name a compiler in CXX"
    )


def _compile(target: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built = Path(folder) / target.name
        command = [
            *(_compiler(), "-shared", "-fPIC", "-std=c++20", "-O1", "-w"),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-I{torch_folder / 'include'}",
            *(str(_SOURCE), "-o", str(built)),
            *(f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}"),
            *("-ltorch_cpu", "-lc10"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            raise UserError(
                f"--simulate: {_SOURCE.name} does not compile against torch {torch.__version__}: "
                f"{lines[0] if lines else done.stderr.strip()[:200]}; use a compiler that this "
                "torch supports"
            )
        os.replace(built, target)


def check_torch(version: str) -> None:
    """Checks that the simulation knows a version of torch.

    Raises:
        UserError: It is too old or too new.
    """
    if OLDEST_TORCH <= Version(version).release[:2] <= NEWEST_TORCH:
        return
    oldest, newest = (".".join(map(str, one)) for one in (OLDEST_TORCH, NEWEST_TORCH))
    raise UserError(
        f"--simulate: torch {version} is installed, and the simulation needs torch {oldest} to "
        f"{newest}; install one of these, or leave --simulate out"
    )


# Before `mode` and `process_group` import what another torch may not have.
check_torch(torch.__version__)


def _build_of_torch() -> str:
    """Describes the installed build; the CPU and CUDA builds of a version may have one name."""
    versions: Any = torch.version
    return repr(
        (
            *(str(Path(torch.__file__).parent), torch.__version__, versions.git_version),
            *(versions.cuda, versions.hip, torch._C._GLIBCXX_USE_CXX11_ABI),
        )
    )


def library_path() -> Path:
    """Returns the compiled library, which is compiled first if the cache does not have it.

    Raises:
        UserError: There is no compiler, or it fails.
    """
    content = _SOURCE.read_bytes() + _build_of_torch().encode()
    digest = hashlib.sha256(content).hexdigest()[:12]
    target = _cache_folder() / f"libguard-{torch.__version__}-{digest}.so"
    if not target.exists():
        try:
            _compile(target)
        except OSError as error:
            raise UserError(
                f"--simulate: cannot write {target}: {error.strerror}; set XDG_CACHE_HOME to a "
                "folder that can be written"
            ) from None
    return target
