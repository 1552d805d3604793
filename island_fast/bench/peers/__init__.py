"""The tools that island is compared with: restic, Borg 1 and 2, Cinder's driver, qemu's dirty bitmaps.

`all_peers` lists them with their versions; the other modules run them. Only the bench imports this folder.
"""
