"""Two sections of cinder.conf with one folder of volumes."""

from __future__ import annotations

import pytest

from tests.cinder.services import Services

FIRST, SECOND = "hosto", "hostp"


def test_the_second_service_with_a_folder_of_volumes_is_refused(services: Services) -> None:
    """A section is a service of its own, such as compute17@ssd; here the hosts have other names too."""
    first = services.island(host=FIRST)
    services.run(host=FIRST, backend=first)
    shared = services.island(host=SECOND, island_volumes_dir=first["island_volumes_dir"])
    services.region().configure(SECOND, shared)
    program = services.region().service(f"volume-{SECOND}")
    try:
        with pytest.raises(AssertionError, match="VolumeDriverException"):
            services.start_volume(host=SECOND)
        said = program.text()
    finally:
        program.stop()
    assert f"belong to the service {FIRST}@island, and this is {SECOND}@island" in said
    services.region().service(f"volume-{FIRST}").stop()
    services.start_volume(host=FIRST)
