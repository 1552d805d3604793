"""Where objects go: a directory or OpenStack Swift, and how fast.

`open.py` is the only door: it makes a `Store` (`base.py`, the contract) from a URL. A store is write-once: an
object that was put is never replaced. `swift*.py` are the parts of the Swift store, `rate_limit.py` wraps any
store.

Imports: the ground floor. swiftclient, keystoneauth1 and openstacksdk are imported only here, and only by the
Swift store. Imported by `repository/` and above.
"""
