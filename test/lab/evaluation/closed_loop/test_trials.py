"""Faults pinned: episodes that depend on other episodes, an ablation with the right instruction."""

from __future__ import annotations

from pi05_lab.evaluation.closed_loop.trials import chosen_tasks, plan_trials, spread
from pi05_lab.sim.tasks import VERBS, Task, parse, wordings

TOUCH = Task("touch", "left", "red")


def test_an_episode_does_not_depend_on_the_others() -> None:
    alone = plan_trials([(TOUCH, 2)], 7)
    among = plan_trials([(task, 3) for task in chosen_tasks(VERBS)], 7)
    twin = next(t for t in among if t.task == TOUCH and t.number == 1)
    assert alone[1] == twin
    assert alone[1].policy_seed == twin.policy_seed
    assert alone[1].rng().random() == twin.rng().random()
    assert alone[1].rng().random() != alone[0].rng().random()
    assert alone[1].rng().random() != plan_trials([(TOUCH, 2)], 8)[1].rng().random()


def test_a_shuffled_episode_has_another_instruction_and_the_same_places() -> None:
    counted = [(task, 4) for task in chosen_tasks(VERBS)]
    plain, shuffled = plan_trials(counted, 0), plan_trials(counted, 0, conditions=("shuffled",))
    for one, other in zip(plain, shuffled, strict=True):
        assert one.task == other.task and one.rng().random() == other.rng().random()
        assert parse(one.instruction) == one.task
        assert parse(other.instruction) == other.instructed != other.task
        assert other.instructed.verb == other.task.verb or other.task.verb == "home"


def test_held_out_wordings_are_no_training_wordings() -> None:
    counted = [(task, 10) for task in chosen_tasks(VERBS)]
    for held_out in (True, False):
        for trial in plan_trials(counted, 0, held_out=held_out):
            assert trial.instruction in wordings(trial.task, held_out)


def test_few_episodes_are_spread_over_both_arms() -> None:
    counted = spread(chosen_tasks(("touch", "home")), 8)
    assert [count for task, count in counted if task.verb == "home"] == [8]
    touches = [(task, count) for task, count in counted if task.verb == "touch"]
    assert sum(count for _, count in touches) == 8 and len(touches) == 6
    assert {task.side for task, count in touches if count == 2} == {"left", "right"}
    assert len(spread(chosen_tasks(("touch",)), 2)) == 2


def test_arms_and_cubes_are_chosen() -> None:
    tasks = chosen_tasks(("pick", "wave", "home"), ("green",), ("right",))
    assert tasks == [Task("pick", "right", "green"), Task("wave", "right"), Task("home")]
