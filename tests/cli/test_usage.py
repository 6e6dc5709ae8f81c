import pytest

from mpkernels.spec import all_specs


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["validate", "compositee"], "OPS"),
        (["validate", "--backend", "cudnn"], "--backend"),
        (["validate", "--dtype", "int8"], "--dtype"),
        (["validate", "--device", "tpu"], "--device"),
        (["validate", "--cases", "no case is called so"], "--cases"),
        (["validate", "--implementation", "x:y", "--backend", "cpu"], "--backend"),
        (["validate", "composite", "--implementation", "x"], "--implementation"),
        (["validate", "composite", "--implementation", "no_such_module:f"], "--implementation"),
        (["validate", "composite", "--implementation", "math:no_such_function"], "--implementation"),
        (["validate", "composite", "--implementation", "math:pi"], "--implementation"),
        (["validate", "--wrong"], "--wrong"),
        (["bench", "nothing"], "OPS"),
        (["bench", "--workload", "no workload is called so"], "--workload"),
        (["bench", "--repeats", "0"], "--repeats"),
        (["bench", "--repeats", "many"], "--repeats"),
        (["bench", "--threads", "-1"], "--threads"),
        (["bench", "--record", "--workload", "call"], "--record"),
        (["demo", "nothing"], "NAME"),
        (["demo", "--backend", "cudnn"], "--backend"),
        (["nothing"], "nothing"),
    ],
)
def test_bad_usage_is_one_line_that_names_the_argument(run, tmp_path, arguments, named):
    (tmp_path / "x.py").write_text("def y(**arguments): return ()\n")
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert named in result.stderr


def test_implementation_needs_one_op(run, tmp_path):
    if len(all_specs()) > 1:
        (tmp_path / "one.py").write_text("def f(**arguments): return ()\n")
        result = run("validate", "--implementation", "one:f")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert "OPS" in result.stderr


def test_help_and_version(run):
    for arguments in ([], ["--help"], ["bench", "--help"]):
        result = run(*arguments)
        assert result.exit_code == 0
        assert "Usage" in result.stdout
    assert run("--version").stdout.count(".") == 2
