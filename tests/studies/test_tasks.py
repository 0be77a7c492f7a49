import torch

from repscope.studies import load
from repscope.studies.models import mlp
from repscope.studies.tasks import class_pairs, permuted, pooled_test, whole


def test_permuted_tasks_are_the_same_pixels_in_another_order():
    data = load("digits")
    tasks = permuted(data, seed=3)
    assert len(tasks) == 3
    for task in tasks:
        assert torch.equal(task.x_train.sort(1).values, data.x_train.sort(1).values)
        assert torch.equal(task.y_test, data.y_test)
    assert not torch.equal(tasks[0].x_test, tasks[1].x_test)
    again = permuted(data, seed=3)
    assert torch.equal(tasks[2].x_train, again[2].x_train)
    assert not torch.equal(tasks[2].x_train, permuted(data, seed=4)[2].x_train)


def test_one_permutation_serves_training_and_test():
    data = load("digits")
    task = permuted(data, seed=0)[0]
    for i in range(64):
        column = task.x_train[:, i]
        if not column.any():
            continue  # dark in training: several columns are equal to it
        j = next(j for j in range(64) if torch.equal(data.x_train[:, j], column))
        assert torch.equal(task.x_test[:, i], data.x_test[:, j])


def test_class_pairs_cover_every_row_once_under_its_own_label():
    data = load("digits")
    tasks = class_pairs(data)
    assert [task.name for task in tasks] == ["0/1", "2/3", "4/5", "6/7", "8/9"]
    assert sum(len(task.y_train) for task in tasks) == len(data.y_train)
    assert set(tasks[3].y_test.tolist()) == {6, 7}


def test_the_pooled_test_rows_of_one_task_are_its_test_rows():
    data = load("digits")
    x, y = pooled_test(whole(data))
    assert torch.equal(x, data.x_test)
    assert torch.equal(y, data.y_test)
    assert len(pooled_test(permuted(data, seed=0))[0]) == 1500


def test_equal_seeds_give_equal_networks_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    a, b, c = mlp([4, 3, 2], seed=1), mlp([4, 3, 2], seed=1), mlp([4, 3, 2], seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.linear1.weight, b.linear1.weight)
    assert not torch.equal(a.linear1.weight, c.linear1.weight)
