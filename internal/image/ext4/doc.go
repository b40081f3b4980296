// Package ext4 writes a new ext4 file system into a file: a tree of files,
// directories, links, devices and extended attributes goes in, a disk that a
// Linux kernel mounts and grows while mounted comes out.
//
// It writes and never reads: there is no mount, no privilege, no host tool
// and, above all, no copy of the tree on the host's own file system. What
// comes from a hostile archive is therefore never a path of the host's, a
// set-uid file or a device node of the host's; the worst name it can hold is a
// name inside the new file system.
//
// # Why not mke2fs
//
// The job could be given to "mke2fs -d DIR" after unpacking into DIR. Measured
// with a Debian root of 265 MB and 9,900 names on a busy 2-core host: GNU tar
// and mke2fs 1.47 under one fakeroot 6.6 s, this package 0.25 s (0.4 s with
// the sync), from the same tar. That way also writes everything twice, unpacks
// hostile archives into a real directory, and, run by an ordinary user, left a
// file with security.capability out altogether (fakeroot 1.31).
// hcsshim's tar2ext4 streams as this package does, but writes sparse_super2
// without a journal, and the kernel does not grow that while it is mounted.
//
// # Layout
//
// Blocks of 4 KiB, groups of 128 MiB, 256-byte inodes, 64-byte descriptors;
// the features are those of mke2fs's "ext4" type: journal, extents, 64bit,
// flex_bg, metadata_csum, sparse_super, resize_inode. The size is a whole
// number of groups, which costs nothing because the file is sparse.
//
//	group 0                                 1, 3, 5, 7, 9, 25, 27, 49 …     others
//	┌────┬─────────────┬─────────┬──────┐   ┌────┬─────────────┬──────┐   ┌──────┐
//	│ sb │ descriptors │ journal │ data │   │ sb │ descriptors │ data │   │ data │
//	│  1 │ 256 blocks  │ 8192    │      │   │  1 │ 256 blocks  │      │   │      │
//	└────┴─────────────┴─────────┴──────┘   └────┴─────────────┴──────┘   └──────┘
//
// The 256 blocks hold the group descriptors in use and, through the resize
// inode, those reserved for growth: room for 16384 groups, 2 TiB. (Past that
// the kernel turns to the meta_bg layout by itself.) Data is written in the
// order in which it comes; directories, attribute and extent blocks, bitmaps
// and inode tables follow once the tree is complete, wherever blocks are free
// (flex_bg allows that). Nothing is left for the guest to initialise lazily:
// what was not written is a hole, reads as zeros, and is flagged as zeroed.
//
// The same calls in the same order give the same bytes: identifiers are drawn
// from a hash of the tree, time stamps from its entries.
//
// Directories are lists without an index, as mke2fs makes them; the kernel
// gives one to those that outgrow their first block in the guest.
//
// A Writer is for one goroutine. The format's facts are those of the Linux
// kernel's Documentation/filesystems/ext4.
package ext4
