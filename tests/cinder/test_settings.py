"""What the driver's options change, each on a host of its own."""

from __future__ import annotations

import os

import tests.cinder.guest as guest
from tests.cinder.programs import wait_for
from tests.cinder.services import Services


def test_images_made_at_once_and_sweeps(services: Services) -> None:
    """Both in one host, for each takes long to start."""
    host = "hostn"
    repository = services.account.folder("swept")
    options = {"island_lazy_images": False, "island_repository": repository, "island_sweep_interval": 60}
    cloud = services.run(host=host, backend=services.island(host=host, **options))
    volume = cloud.create_volume(host=host)
    assert guest.image(cloud.region, volume, host).exists()
    attached = cloud.attach(volume, cloud.connector(host))
    guest.write(attached.device, 0, guest.noise("swept", 1 << 20))
    cloud.detach(attached, volume)
    snapshot = cloud.snapshot(volume)
    child = cloud.create_volume(snapshot_id=snapshot.id)
    clone = cloud.create_volume(source_volid=child.id)
    assert all(guest.image(cloud.region, one, host).exists() for one in (child, clone))
    cloud.delete_snapshot(snapshot)  # nobody needs it any more
    for one in (volume, child, clone):
        cloud.delete_volume(one)
    lineage = repository / volume.id
    assert os.path.isdir(lineage)

    def left() -> list[str]:
        return [path.name for path in lineage.rglob("*") if path.is_file() and "catalog" not in path.parts]

    wait_for("the sweep removes what is left", lambda: not left(), lambda: f"{left()} is left", patience=200)
