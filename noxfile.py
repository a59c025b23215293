"""The developer's daily commands: `nox -s tests`, or `nox -l` for the list. CI runs the same ones."""

from __future__ import annotations

import os

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


def install(session: nox.Session, *extras: str) -> None:
    """Install the project with its extras, as CI resolves them."""
    session.install("-c", "constraints.txt", f".[{','.join(extras)}]")


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff and clang-format; `nox -s lint -- --fix` repairs what can be repaired."""
    session.install("ruff==0.17.6", "clang-format==22.1.8")
    fix = "--fix" in session.posargs
    session.run("ruff", "check", ".", *(["--fix"] if fix else []))
    session.run("ruff", "format", ".", *([] if fix else ["--check"]))
    listed = session.run("git", "ls-files", "*.cpp", "*.h", external=True, silent=True)
    session.run("clang-format", *(["-i"] if fix else ["--dry-run", "--Werror"]), *(listed or "").split())


@nox.session
def types(session: nox.Session) -> None:
    """Mypy, strict, on the package."""
    install(session, "dev")
    session.run("mypy", "--strict", "python/driftmax")


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The suite; arguments go to pytest: `nox -s tests-3.11 -- tests/ops -x`."""
    install(session, "test")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def nightly(session: nox.Session) -> None:
    """The long statistics and the pretrained model, with everything else; all kernels for all targets."""
    install(session, "test", "examples")
    session.run("python", "-m", "pytest", "-m", "slow or not slow", *session.posargs)
    session.run("driftmax", "compile")


@nox.session
def fuzz(session: nox.Session) -> None:
    """The native drivers under the sanitizers: `nox -s fuzz -- SECONDS SEED`."""
    seconds, seed = (
        (*session.posargs, "60", "1")[:2] if len(session.posargs) != 1 else (session.posargs[0], "1")
    )
    session.install("cmake>=3.25", "ninja")
    for preset in ("asan-ubsan", "tsan"):
        session.run(
            "cmake", "--preset", preset, f"-DDRIFTMAX_FUZZ_SECONDS={seconds}", f"-DDRIFTMAX_FUZZ_SEED={seed}"
        )
        session.run("cmake", "--build", "--preset", preset)
        session.run(
            "setarch", os.uname().machine, "-R", "ctest", "--preset", preset, "--verbose", external=True
        )


@nox.session
def wheel(session: nox.Session) -> None:
    """Sdist, the wheel built from it, and the test of their contents."""
    install(session, "test")
    dist = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", dist, ".")
    session.run("python", "-m", "pytest", "tests/test_packaging.py", env={"DRIFTMAX_DIST": dist})


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks; arguments go to `driftmax bench`."""
    install(session, "bench")
    session.run("driftmax", "bench", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Examples of the README and of every docstring, and the links between pages."""
    install(session, "bench", "test")
    session.run("python", "-m", "pytest", "tests/test_readme.py")
    session.run("python", "-m", "pytest", "--doctest-modules", "--pyargs", "driftmax")
