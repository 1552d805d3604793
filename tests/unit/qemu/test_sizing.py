"""Cluster sizes and caches by volume size: where the steps are, and that the caches hold every table."""

import pytest

from island_fast.errors import UsageError
from island_fast.qemu.sizing import Caches, cache_sizes, cluster_size, node_options

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

STEPS = [
    (128 * GIB, 64 * KIB),
    (256 * GIB, 128 * KIB),
    (512 * GIB, 256 * KIB),
    (TIB, 512 * KIB),
    (2 * TIB, MIB),
    (4 * TIB, 2 * MIB),
]


@pytest.mark.parametrize("volume, cluster", STEPS)
def test_each_cluster_size_goes_up_to_a_volume_size(volume, cluster):
    assert cluster_size(volume) == cluster
    assert cluster_size(volume - 1) == cluster
    assert cluster_size(volume + 1) == min(2 * cluster, 2 * MIB)


def test_the_smallest_and_the_biggest_volumes():
    assert cluster_size(0) == cluster_size(1) == cluster_size(GIB) == 64 * KIB
    assert cluster_size(16 * TIB) == cluster_size(64 * TIB) == 2 * MIB


@pytest.mark.parametrize("volume, cluster", STEPS)
def test_a_volume_has_no_more_clusters_than_its_guest_can_wait_for(volume, cluster):
    assert volume // cluster == 2 << 20


def test_caches_of_a_volume_of_one_tebibyte():
    assert cache_sizes(TIB, 512 * KIB) == Caches(l2=16 * MIB, refcount=25 * 512 * KIB)


@pytest.mark.parametrize("cluster", [1 << bits for bits in range(16, 22)])
@pytest.mark.parametrize("volume", [1, 5 * GIB + 512, 100 * GIB, TIB])
def test_caches_are_whole_tables_and_hold_them_all(volume, cluster):
    caches = cache_sizes(volume, cluster)
    tables = -(-volume // (cluster * (cluster // 8)))
    assert caches.l2 == max(2, tables) * cluster
    blocks, rest = divmod(caches.refcount, cluster)
    assert rest == 0
    assert blocks * (cluster // 2) * cluster >= 3 * volume


def test_caches_of_the_biggest_volume_hold_all_tables_too():
    assert cache_sizes(16 * TIB, 2 * MIB) == Caches(l2=64 * MIB, refcount=25 * 2 * MIB)


@pytest.mark.parametrize("cluster", [512, 4 * KIB, 64 * KIB, 2 * MIB])
def test_no_image_makes_a_cache_of_more_than_a_quarter_of_a_gibibyte(cluster):
    caches = cache_sizes(1 << 62, cluster)
    assert caches.l2 == 256 * MIB
    assert caches.refcount == 256 * MIB - cluster


@pytest.mark.parametrize("cluster", [64 * KIB, 512 * KIB, 2 * MIB])
def test_no_two_blocks_of_reference_counts_want_one_place_in_the_cache(cluster):
    """qemu looks for a table first at offset / cluster * 4 modulo the number of places, then one by one."""
    for volume in (10 * GIB, 100 * GIB, TIB, 4 * TIB):
        places = cache_sizes(volume, cluster).refcount // cluster
        step = cluster // 2  # clusters that one block counts, so that is how far blocks are apart
        wanted = {block * step * 4 % places for block in range(places)}
        assert len(wanted) == places


@pytest.mark.parametrize("cluster", [0, -512, 256, 513, 96 * KIB])
def test_what_is_no_cluster_size_is_refused(cluster):
    with pytest.raises(UsageError, match="power of two"):
        cache_sizes(GIB, cluster)


def test_a_negative_size_is_refused():
    with pytest.raises(UsageError, match="-1 bytes"):
        cluster_size(-1)
    with pytest.raises(UsageError, match="-1 bytes"):
        cache_sizes(-1, 64 * KIB)


def test_options_of_a_served_image():
    options = node_options(TIB, 512 * KIB)
    assert options == {
        "l2-cache-size": 16 * MIB,
        "refcount-cache-size": 25 * 512 * KIB,
        "pass-discard-snapshot": False,
    }
