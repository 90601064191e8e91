"""Who works, prints and tells why, without starting processes."""

import sys

import pytest

from entreg import distributed
from entreg.cli import hydra_main, run_script
from entreg.errors import ConfigError


class Group:
    """Several processes as torch.distributed shows them to one: what the others gave is known."""

    def __init__(self, rank, others):
        self.rank, self.others = rank, others

    def get_rank(self):
        return self.rank

    def get_world_size(self):
        return len(self.others)

    def all_gather_object(self, found, mine):
        found[:] = [mine if rank == self.rank else value for rank, value in enumerate(self.others)]

    def broadcast_object_list(self, content):
        content[0] = content[0] if self.rank == 0 else self.others[0]


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("items", [0, 1, 2, 3, 4, 7, 12])
def test_turns_are_all_items_once_and_come_back_in_order(monkeypatch, processes, items):
    shares = [list(range(rank, items, processes)) for rank in range(processes)]
    for rank in range(processes):
        monkeypatch.setattr(distributed, "_group", lambda rank=rank: Group(rank, shares))
        assert list(distributed.my_turns(items)) == shares[rank]
        assert distributed.in_order(distributed.my_turns(items)) == list(range(items))


def test_what_one_process_makes_and_what_all_have(monkeypatch):
    assert distributed.from_first(lambda: 5) == 5
    assert distributed.from_all(3) == [3]
    assert distributed.mean_of_all(0.1) == 0.1
    monkeypatch.setattr(distributed, "_group", lambda: Group(1, [7.0, None, 2.0]))
    assert distributed.from_first(lambda: pytest.fail("made twice")) == 7.0
    assert distributed.mean_of_all(3.0) == 4.0
    assert distributed.num_processes() == 3
    monkeypatch.setattr(distributed, "_group", lambda: Group(0, [None, 1, 2]))
    assert distributed.from_first(lambda: 5) == 5


def test_alone_there_is_nothing_to_share():
    assert distributed.is_first()
    assert not distributed.launched()
    assert distributed.num_processes() == 1
    assert list(distributed.my_turns(3)) == [0, 1, 2]
    with distributed.joined("cpu"):
        assert distributed.num_processes() == 1


@pytest.fixture
def second(monkeypatch):
    """This process is the second of two."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")


def test_only_the_first_process_prints(capsys, second, monkeypatch):
    assert not distributed.is_first()
    assert run_script(lambda: print("a table")) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("RANK", "0")
    assert run_script(lambda: print("a table")) == 0
    assert capsys.readouterr().out == "a table\n"


@pytest.mark.parametrize("tells", [True, False])
def test_one_process_tells_why(capsys, second, monkeypatch, tells):
    monkeypatch.setattr(distributed, "tells", lambda: tells)

    def wrong():
        raise ConfigError("that is not possible")

    assert run_script(wrong) == 2
    assert capsys.readouterr().err == ("Error: that is not possible\n" if tells else "")


def test_scripts_that_share_nothing_are_the_first_processes_business(tmp_path, second, monkeypatch):
    (tmp_path / "one.yaml").write_text("x: 1\n")
    monkeypatch.setattr(sys, "argv", ["one.py"])
    main = hydra_main("one", tmp_path)(lambda config: pytest.fail("ran"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
