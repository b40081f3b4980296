// Package image keeps root disks: it builds the named recipes, pulls OCI
// images, imports archives, and answers what a name means.
//
// An image is a directory that is written once: disk.ext4, which machines only
// ever read through layers of their own; image.json, which says what a process
// in it starts with; and for some recipes a few files taken out of the disk.
// It is named by its content: the SHA-256 over the size, the blocks that are
// not zero with their offsets, and the configuration, so that how sparse the
// file is does not matter. A name is a small file that holds a digest.
//
// Layout of Options.Dir:
//
//	sha256-HEX/{disk.ext4,image.json,…}   0755, files 0444
//	names/NAME                            "sha256:HEX\n", / written as %2F
//	tmp-*/                                work in progress, 0700
//	lock                                  held while names or images change
//
// # What survives a crash
//
// Everything is made in a tmp directory, synced, and appears by one rename: an
// image is whole or absent. A name is replaced by rename too, after its image
// is there; one that stands for nothing counts as absent. A tmp directory is
// locked (flock) by whoever works in it, so that [Open] clears those of dead
// processes and no others.
//
// # How disks are made
//
// Package ext4 writes the file system straight from tar streams: layers and
// archives are never unpacked on the host, so that no name, link or device of
// a hostile one can touch it, and no privilege is needed. Only the Debian
// recipes run other programs: mmdebstrap, whose tar is read from a pipe.
//
// Not its job: kernels and initrds (packages kernel and initrd), the disks that
// machines write to (storage), finding credentials (they come with the call).
//
// Lock order: flights.mu and Store.mu are never held together; Store.mu comes
// before the lock file.
package image
