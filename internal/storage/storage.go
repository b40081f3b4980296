// Package storage says what every storage driver promises. The drivers are its
// subpackages, and [github.com/agentiso/agentiso/internal/storage/storagetest]
// is the suite that holds each of them to this page. No logic is here, and
// drivers do not import it: they are joined to package workspace, which
// declares the part it uses, by cmd/agentiso alone.
//
// # Contract
//
// A driver keeps one disk for each id, below one place on the host that is its
// own. An id is 1 to 63 characters of a-z, 0-9 and '-', not beginning with '-';
// snapshot names are formed alike. Anything else is a fault of kind invalid,
// before the host is touched.
//
//   - Calls for different ids may run at the same time. Calls for one id come
//     one at a time, and a clone counts for both.
//   - The base of a disk (an image) is never written to and must stay as it is
//     for as long as a disk made from it exists.
//   - A new disk reads as its base and then as zeros up to its size, which is
//     what was asked, at least the base's, rounded up to a MiB.
//   - Verbs of removal say what should be, not what was: removing what is absent,
//     or what a crash left half made, succeeds and leaves nothing. Verbs of
//     making refuse what exists: a fault of kind in_use for a disk, name_taken
//     for a snapshot.
//   - A verb that failed may leave something under its id; List then names the
//     id, and Remove clears it. Another id is never affected. A snapshot verb
//     that failed leaves the disk readable, either as before or as after.
//   - List names every id that has anything on the host, complete or not, and
//     nothing that is not the driver's.
//   - A full disk is a fault of kind no_space.
//   - Disks are read and written by machines only. A driver does not interpret
//     what a machine can have written, nor run a program that does, with more
//     rights than the machine had.
//   - The snapshot family works on disks without a machine; a disk in use is a
//     fault of kind in_use. (A running machine's disk is switched to a new layer
//     by its own QEMU.)
//   - A clone does not depend on its source: removing either leaves the other.
package storage

import (
	"context"

	"github.com/agentiso/agentiso/internal/domain"
)

// Volumes is what every driver does.
type Volumes interface {
	Create(ctx context.Context, id string, base domain.Disk, sizeBytes int64) (domain.Disk, error)
	Remove(ctx context.Context, id string) error
	// Own hands the disk to the Unix user uid, 0 for the daemon's own, and
	// takes it from whoever had it.
	Own(ctx context.Context, id string, uid int) error
	// UsedBytes is what Remove would free on the host.
	UsedBytes(ctx context.Context, id string) (int64, error)
	List(ctx context.Context) ([]string, error)
}

// Snapshots is what drivers do that can freeze a disk's content.
type Snapshots interface {
	// Snapshot keeps the present content of the disk under name.
	Snapshot(ctx context.Context, id, name string) error
	// RollBack makes the content and the size of the disk those of the
	// snapshot; later snapshots stay.
	RollBack(ctx context.Context, id, name string) error
	RemoveSnapshot(ctx context.Context, id, name string) error
	// Snapshots names the snapshots of the disk, oldest first.
	Snapshots(ctx context.Context, id string) ([]string, error)
	// Clone makes a disk for newID with the snapshot's content and size.
	Clone(ctx context.Context, id, name, newID string) (domain.Disk, error)
}
