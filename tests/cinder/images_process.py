"""Glance's API as a process: `python images_process.py PORT`, its configuration in OS_GLANCE_CONFIG_DIR.

Glance 33 has no server of its own any more, and uwsgi would have to be compiled. Eventlet's is there with
Cinder, and takes what wsgiref does not: requests in pieces, which is how images come.
"""

from __future__ import annotations

import sys

import eventlet
import eventlet.wsgi
from glance.common.wsgi_app import init_app


def main() -> None:
    listener = eventlet.listen(("127.0.0.1", int(sys.argv[1])))
    eventlet.wsgi.server(listener, init_app(), log_output=False)


if __name__ == "__main__":
    main()
