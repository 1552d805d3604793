"""Stores: where objects are kept, a directory or one container of OpenStack Swift.

`open_store(url)` in `open.py` returns a `Store`, the contract that is defined in `base.py`. These are the
rules:

- An object has a name and bytes. It is written once: nothing ever replaces it, and a second `put` of the same
  name succeeds only with the same bytes.
- After a StoreError of `put` the object may or may not exist. Only the same bytes may be sent to that name
  again. Only after a StoreRefusedError, which the store answers for certain, it does not and never will.
- An object is missing only where the store confirms it (ObjectMissingError, or None from `head`). A listing
  can be late or incomplete, and proves nothing.
- A store does not know what its objects mean, and verifies their length only. `get_checked` in
  `checked_read.py` reads an object until its contents are valid.

| module | what it is |
|---|---|
| `base.py` | `Store`, and the rules for names, sizes and ranges |
| `open.py` | from a URL to a store |
| `directory.py` | a store in a directory |
| `directory_reserve.py` | the file that keeps room in it for deletes |
| `swift.py` | a store in a container of Swift: what each method of `Store` sends |
| `swift_auth.py` | signing in: from environment variables to a token |
| `swift_connection.py` | a pool of connections; what a failed request means; the only user of swiftclient |
| `swift_pace.py` | the least speed of a request or response body |
| `swift_ranges.py` | several ranges of an object in one request |
| `retry.py` | the retry loop and its limits |
| `checked_read.py` | reads that are repeated while they return damaged bytes |
| `forwarding.py` | a store in front of another one, which passes everything on |
| `rate_limit.py` | a store around another one that limits bytes per second |

Imports `arrays`, `errors` and `files` of this package. swiftclient, keystoneauth1 and openstacksdk are
imported only here, and only for `swift://` (a directory's user does not wait for them). Used by `repository/`
and everything above it.
"""
