"""The tools that island is compared with: restic, borg, Cinder's chunked driver, qemu's dirty bitmaps.

`all_peers` lists them with their versions; the other modules run them. Only the bench imports this folder.
"""
