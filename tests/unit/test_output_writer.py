"""Where output goes, and what a user meets when it cannot go there."""

import errno
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hypermesh_ebpf.errors import OutputError, UsageError
from hypermesh_ebpf.output.sink import open_sink
from hypermesh_ebpf.output.writer import OutputClosed, Writer

ROOT = Path(__file__).parents[2]
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.fixture
def pipe():
    """A pipe's reading descriptor and its writing end as a text stream."""
    read, write = os.pipe()
    with open(write, "w") as stream:
        yield read, stream
    try:
        os.close(read)
    except OSError as error:  # the test closed it
        assert error.errno == errno.EBADF


def test_what_is_written_is_there_at_once(pipe):
    read, stream = pipe
    stream.write("before ")  # still in Python's buffer
    Writer(stream).write("größer\n".encode())
    assert os.read(read, 100).decode() == "before größer\n"


def test_reader_that_is_gone_ends_the_output(pipe):
    read, stream = pipe
    writer = Writer(stream)
    os.close(read)
    for _ in range(2):
        with pytest.raises(OutputClosed):
            writer.write(b"x")
    assert writer.gone


def test_full_disk_is_an_error_with_a_remedy():
    with open("/dev/full", "w") as stream:
        writer = Writer(stream)
        with pytest.raises(OutputError) as caught:
            writer.write(b"x")
    assert caught.value.errno == errno.ENOSPC
    assert "No space left on device" in str(caught.value)
    assert "free space" in caught.value.remedy


def test_file_that_reached_its_size_limit_is_an_error_with_a_remedy(tmp_path):
    """In a process of its own: the limit is a process's."""
    code = f"""
import resource, signal, sys
from hypermesh_ebpf.output.writer import Writer
from hypermesh_ebpf.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    Writer(open({str(tmp_path / "out")!r}, "w")).write(b"x" * 2000)
except OutputError as error:
    print(error, "|", error.remedy)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "File too large (EFBIG)" in done.stdout
    assert "ulimit -f" in done.stdout


def test_stream_without_a_descriptor_will_do():
    stream = io.StringIO()
    Writer(stream).write("µ\n".encode())
    assert stream.getvalue() == "µ\n"


def test_slow_reader_gets_everything_in_order(pipe):
    read, stream = pipe
    data = bytes(range(256)) * 4096  # many times what a pipe holds
    got = bytearray()

    def drain():
        while len(got) < len(data):
            got.extend(os.read(read, 1000))

    reader = threading.Thread(target=drain)
    reader.start()
    Writer(stream).write(data)
    reader.join()
    assert got == data


def test_descriptor_that_somebody_made_nonblocking_gets_everything(pipe):
    read, stream = pipe
    os.set_blocking(stream.fileno(), False)
    data = b"y" * 300_000
    got = bytearray()

    def drain():
        while len(got) < len(data):
            got.extend(os.read(read, 70_000))

    reader = threading.Thread(target=drain)
    reader.start()
    Writer(stream).write(data)
    reader.join()
    assert got == data


def test_user_who_wants_to_stop_is_not_held_by_a_reader_that_does_not_read(pipe):
    _, stream = pipe
    stopping = threading.Event()
    writer = Writer(stream, stopping.is_set)
    threading.Timer(0.1, stopping.set).start()
    with pytest.raises(OutputClosed):
        writer.write(b"z" * 300_000)
    assert stopping.is_set()


PIPELINE = """
import sys
from hypermesh_ebpf.output.sink import OutputClosed, open_sink
from hypermesh_ebpf.metrics.sample import Event
from hypermesh_ebpf.monitors.declaration import Monitor
monitor = Monitor("m", "", "m.c", (), None, lambda o: (), lambda o: (), events="always")
sink = open_sink({kind!r}, monitor, {{}}, interval=1, top=5, stream=sys.stdout, show_events=True)
print("left in python's buffer")
try:
    while True:
        sink.events([Event(0.0, "m", {{"pid": 1}})] * 100)
except OutputClosed:
    assert sink.lost in range(1, 101), sink.lost
    sink.close()
"""


@pytest.mark.parametrize("kind", ["json", "csv", "table"])
def test_pipeline_that_ends_early_leaves_nothing_on_stderr(kind):
    """`hmebpf ... | head -1` ends with 0 and in silence, whatever Python still had buffered."""
    tool = subprocess.Popen(
        [sys.executable, "-c", PIPELINE.format(kind=kind)],
        cwd=ROOT,
        env=BUFFERED,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert tool.stdout.readline()
    tool.stdout.close()
    assert tool.stderr.read() == ""
    tool.stderr.close()
    assert tool.wait() == 0


def test_full_disk_says_nothing_more_when_the_interpreter_exits():
    code = """
import sys
from hypermesh_ebpf.errors import OutputError
from hypermesh_ebpf.output.writer import Writer
writer = Writer(sys.stdout)
sys.stdout.write("buffered")
try:
    writer.write(b"x")
except OutputError:
    sys.exit(1)
"""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=BUFFERED,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_closed_standard_output_is_an_error_with_a_remedy():
    with pytest.raises(OutputError, match="standard output is closed") as caught:
        open_sink("json", None, {}, interval=1, top=1, stream=None, show_events=False)
    assert "> FILE" in caught.value.remedy


def test_unknown_output_names_the_known_ones():
    with pytest.raises(UsageError, match="--output xml") as caught:
        open_sink("xml", None, {}, interval=1, top=1, stream=sys.stdout, show_events=False)
    assert "table, json, csv" in caught.value.remedy


@pytest.mark.parametrize("kind", ["json", "csv", "table"])
def test_rich_is_not_imported_for_a_pipe(kind):
    code = PIPELINE.format(kind=kind).split("print(")[0] + (
        "sink.events([])\nsys.exit(any(m.split('.')[0] == 'rich' for m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert done.returncode == 0
