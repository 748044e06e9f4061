"""Compiles jax-triton's kernels on all cores.

It compiles each configuration that is tuned one after the other: first Triton while JAX
lowers the call, then ptxas when it runs for the first time. Kernels with tens of slow
configurations take longer than a GPU should wait.
"""

# pyright: reportMissingImports=false

import concurrent.futures
import hashlib
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# What jaxlib passes beside the architecture, the input and the output.
_PTXAS_OPTIONS = ("--warn-on-spills",)


class Pool:
    """Compiles what a function lowers, so that lowering it again finds all compiled."""

    def __init__(self):
        from jax_triton import triton_lib

        self.lib = triton_lib
        self._kept = tempfile.TemporaryDirectory()
        self.folder = pathlib.Path(self._kept.name)
        self._original = triton_lib.compile_ttir_inplace
        self._noted = {}
        self._compiled = {}
        _remember_ptxas(self.folder)

    def compile(self, lower):
        """Compiles all that `lower()` lowers; returns how many kernels that were."""
        cache = self.lib._COMPILED_KERNEL_CACHE
        before = dict(cache)
        self.lib.compile_ttir_inplace = self._note
        try:
            lower()
        finally:
            cache.clear()
            cache.update(before)
            self.lib.compile_ttir_inplace = self._find
        jobs = [key for key in self._noted if key not in self._compiled]
        # Fewer warps hold more of a tile each, and take longer.
        jobs.sort(key=lambda key: (key[1].num_warps, -len(key[0])))
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
            futures = [
                pool.submit(_compile, text, options, capability, self.folder)
                for text, options, capability in (
                    (*key, self._noted[key]) for key in jobs
                )
            ]
            for key, future in zip(jobs, futures):
                try:
                    self._compiled[key] = future.result()
                except Exception as error:  # raised again where it is lowered
                    print(f"not compiled: {error}", file=sys.stderr)
        return len(jobs)

    def _note(self, module, backend, options, capability, platform):
        del backend, platform
        self._noted[str(module), options] = capability
        return self.lib.CompilationResult("", "noted", 0, None, None)

    def _find(self, module, backend, options, capability, platform):
        found = self._compiled.get((str(module), options))
        if found is None:
            return self._original(module, backend, options, capability, platform)
        return self.lib.CompilationResult(*found, None, None)


def _compile(text, options, capability, folder):
    """PTX, name and bytes of shared memory of a kernel; its cubin is remembered."""
    from jax_triton import triton_lib
    from triton._C.libtriton import ir

    backend = triton_lib.get_cuda_backend(0, capability)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    with tempfile.TemporaryDirectory() as place:
        source = pathlib.Path(place, "kernel.ttir")
        source.write_text(text)
        module = ir.parse_mlir_module(str(source), context)
        module.context = context
        result = triton_lib.compile_ttir_inplace(
            module, backend, options, capability, "cuda"
        )
        assembly = pathlib.Path(place, "kernel.ptx")
        assembly.write_text(result.binary)
        suffix = "a" if capability >= 90 else ""
        command = [folder / "bin" / "ptxas", f"-arch=sm_{capability}{suffix}"]
        command += [*_PTXAS_OPTIONS, assembly, "-o", f"{assembly}.cubin"]
        subprocess.run(command, check=True, capture_output=True)
    return result.binary, result.name, result.shared_mem_bytes


def _remember_ptxas(folder):
    """Puts a ptxas that remembers what it compiled where jaxlib looks first."""
    found = shutil.which("ptxas") or "/usr/local/cuda/bin/ptxas"
    if not os.access(found, os.X_OK):
        raise RuntimeError(f"there is no ptxas in PATH, nor {found}")
    place = folder / "bin"
    place.mkdir(exist_ok=True)
    script = place / "ptxas"
    script.write_text(
        f"#!/bin/sh\nexec {sys.executable} -I -S {os.path.abspath(__file__)} "
        f'{found} {folder} "$@"\n'
    )
    script.chmod(0o755)
    os.environ["PATH"] = f"{place}:{os.environ.get('PATH', '')}"


def _ptxas(real, folder, *arguments):
    """Runs ptxas, or copies what it made of the same input with the same options."""
    if "-o" not in arguments:
        return subprocess.run([real, *arguments]).returncode
    output = arguments[arguments.index("-o") + 1]
    files = [x for x in arguments if x != output and os.path.isfile(x)]
    options = sorted({*arguments} - {*files, output, "-o", "-v", "--verbose"})
    digest = hashlib.sha256(repr(options).encode())
    for file in files:
        digest.update(pathlib.Path(file).read_bytes())
    kept = pathlib.Path(folder, digest.hexdigest())
    if not kept.exists():
        status = subprocess.run([real, *arguments]).returncode
        if status:
            return status
        draft = kept.with_suffix(f".{os.getpid()}")
        shutil.copy(output, draft)
        draft.replace(kept)
    shutil.copy(kept, output)
    return 0


if __name__ == "__main__":
    sys.exit(_ptxas(*sys.argv[1:]))
