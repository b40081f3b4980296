package qcow2

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// maxDepth bounds how many layers a disk may stand on: each one costs QEMU an
// open file and a look-up.
const maxDepth = 64

// Snapshot freezes the layer that the machine wrote to and puts an empty one
// over it. A crash leaves the disk on either, with the same content.
func (s *Store) Snapshot(_ context.Context, id, name string) error {
	verb := fmt.Sprintf("snapshot disk %s as %s", id, name)
	d, err := s.openIdle(verb, id, name)
	if err != nil {
		return err
	}
	defer d.Close()
	if _, err := d.Lstat(mark + name); err == nil {
		return fault.New(fault.NameTaken, "workspace %s has a snapshot %s already", id, name).
			WithNext("Choose another name, or remove that snapshot first.")
	}
	if chain := layers(d, diskName); len(chain) >= maxDepth {
		return fault.New(fault.Limit, "the disk of %s stands on %d layers, which is the limit", id, len(chain)).
			WithNext("Create a new workspace from an image of its content.")
	}
	layer := layerPrefix + strings.ToLower(rand.Text()) + layerSuffix
	if err := s.freeze(d, layer, mark+name); err != nil {
		return hostFault(verb, errors.Join(err, sweep(d)))
	}
	return nil
}

func (s *Store) freeze(d *os.Root, layer, link string) error {
	f, err := openLayer(d, diskName, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	size, _, err := readOverlay(f)
	if err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := s.replacement(d, Overlay{size, layer, domain.QCOW2}, st); err != nil {
		return err
	}
	if err := s.step("link"); err != nil {
		return err
	}
	if err := d.Link(diskName, layer); err != nil {
		return err
	}
	if err := s.step("own"); err != nil {
		return err
	}
	// Before the rename: a layer that is stood on is always the daemon's. A
	// disk left like this by a crash gets its owner back from Own.
	if err := own(f, s.euid, os.Getegid(), 0o444); err != nil {
		return err
	}
	if err := s.step("rename"); err != nil {
		return err
	}
	if err := d.Rename(newName, diskName); err != nil {
		return err
	}
	if err := s.step("publish"); err != nil {
		return err
	}
	if err := d.Symlink(layer, link); err != nil {
		return err
	}
	return syncDir(d)
}

// replacement writes the layer that is about to take the disk's place, with the
// disk's owner.
func (s *Store) replacement(d *os.Root, o Overlay, like fs.FileInfo) error {
	if err := d.Remove(newName); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := s.writeLayer(d, newName, o, true); err != nil {
		return err
	}
	f, err := openLayer(d, newName, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer f.Close()
	sys, ok := like.Sys().(*unixStat)
	if !ok {
		return errors.New("the disk's owner is not known")
	}
	return own(f, int(sys.Uid), int(sys.Gid), 0o600)
}

// RollBack puts an empty layer over the snapshot's in the disk's place.
func (s *Store) RollBack(_ context.Context, id, name string) error {
	verb := fmt.Sprintf("roll disk %s back to %s", id, name)
	d, err := s.openIdle(verb, id, name)
	if err != nil {
		return err
	}
	defer d.Close()
	layer, size, err := s.resolve(d, id, name)
	if err != nil {
		return err
	}
	err = func() error {
		st, err := d.Lstat(diskName)
		if err != nil {
			return err
		}
		if err := s.replacement(d, Overlay{size, layer, domain.QCOW2}, st); err != nil {
			return err
		}
		if err := s.step("rename"); err != nil {
			return err
		}
		if err := d.Rename(newName, diskName); err != nil {
			return err
		}
		return syncDir(d)
	}()
	if err := errors.Join(err, sweep(d)); err != nil {
		return hostFault(verb, err)
	}
	return nil
}

// RemoveSnapshot forgets a snapshot; its layer stays for as long as the disk or
// another snapshot stands on it.
func (s *Store) RemoveSnapshot(_ context.Context, id, name string) error {
	verb := fmt.Sprintf("remove snapshot %s of disk %s", name, id)
	if err := errors.Join(validID(id), validID(name)); err != nil {
		return err
	}
	d, err := s.openDir(id, false)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return hostFault(verb, err)
	}
	defer d.Close()
	if err := d.Remove(mark + name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return hostFault(verb, err)
	}
	if err := s.step("sweep"); err != nil {
		return err
	}
	if err := errors.Join(sweep(d), syncDir(d)); err != nil {
		return hostFault(verb, err)
	}
	return nil
}

// Snapshots names the snapshots of id, oldest first.
func (s *Store) Snapshots(_ context.Context, id string) ([]string, error) {
	verb := "list snapshots of disk " + id
	if err := validID(id); err != nil {
		return nil, err
	}
	d, err := s.openDir(id, false)
	if err != nil {
		return nil, notFoundFault(verb, id, err)
	}
	defer d.Close()
	names, err := entries(d)
	if err != nil {
		return nil, hostFault(verb, err)
	}
	made := map[string]time.Time{}
	var snapshots []string
	for _, n := range names {
		name, ok := strings.CutPrefix(n, mark)
		if !ok {
			continue
		}
		st, err := d.Lstat(n)
		if err != nil {
			return nil, hostFault(verb, err)
		}
		snapshots = append(snapshots, name)
		made[name] = st.ModTime()
	}
	slices.SortFunc(snapshots, func(a, b string) int {
		return cmp.Or(made[a].Compare(made[b]), strings.Compare(a, b))
	})
	return snapshots, nil
}

// Clone makes a disk for newID over the snapshot's layer, which both then have.
func (s *Store) Clone(_ context.Context, id, name, newID string) (domain.Disk, error) {
	verb := fmt.Sprintf("clone disk %s from %s of %s", newID, name, id)
	fail := func(err error) (domain.Disk, error) { return domain.Disk{}, hostFault(verb, err) }
	if err := errors.Join(validID(id), validID(name), validID(newID)); err != nil {
		return fail(err)
	}
	src, err := s.openDir(id, false)
	if err != nil {
		return domain.Disk{}, notFoundFault(verb, id, err)
	}
	defer src.Close()
	layer, size, err := s.resolve(src, id, name)
	if err != nil {
		return fail(err)
	}
	d, err := s.openDir(newID, true)
	if err != nil {
		return fail(err)
	}
	defer d.Close()
	if _, err := d.Lstat(diskName); err == nil {
		return fail(exists(newID))
	}
	if err := sweep(d); err != nil { // of a clone that was cut off
		return fail(err)
	}
	for _, l := range append([]string{layer}, layers(src, layer)...) {
		if err := s.step("link"); err != nil {
			return fail(err)
		}
		if err := s.root.Link(id+"/"+l, newID+"/"+l); err != nil {
			return fail(err)
		}
	}
	if err := s.step("disk"); err != nil {
		return fail(err)
	}
	if err := s.writeLayer(d, diskName, Overlay{size, layer, domain.QCOW2}, !s.opt.NoSync); err != nil {
		return fail(err)
	}
	return s.disk(newID, size), nil
}

// openIdle opens the directory of a disk that no QEMU has open.
func (s *Store) openIdle(verb, id, name string) (_ *os.Root, err error) {
	if err := errors.Join(validID(id), validID(name)); err != nil {
		return nil, err
	}
	d, err := s.openDir(id, false)
	if err != nil {
		return nil, notFoundFault(verb, id, err)
	}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	f, err := openLayer(d, diskName, os.O_RDONLY)
	if err != nil {
		return nil, notFoundFault(verb, id, err)
	}
	defer f.Close()
	switch held, err := busy(f); {
	case err != nil:
		return nil, hostFault(verb, err)
	case held:
		return nil, fault.New(fault.InUse, "cannot %s: a process has the disk open", verb).
			WithNext("Stop the workspace first.")
	}
	return d, nil
}

// resolve finds a snapshot's layer and its size.
func (s *Store) resolve(d *os.Root, id, name string) (layer string, size int64, err error) {
	layer, err = d.Readlink(mark + name)
	if errors.Is(err, fs.ErrNotExist) {
		return "", 0, fault.New(fault.NotFound, "workspace %s has no snapshot %s", id, name).
			WithNext("Look at the snapshots that it has.")
	}
	if err != nil {
		return "", 0, err
	}
	if !isLayer(layer) {
		return "", 0, fmt.Errorf("snapshot %s of %s leads to %.80q", name, id, layer)
	}
	f, err := openLayer(d, layer, os.O_RDONLY)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	size, _, err = readOverlay(f)
	return layer, size, err
}

func isLayer(name string) bool {
	x, ok := strings.CutPrefix(name, layerPrefix)
	x, ok2 := strings.CutSuffix(x, layerSuffix)
	return ok && ok2 && plainName(x)
}

// layers returns what the file from stands on inside the directory, nearest
// first. The chain ends where a file names no layer that is there: at the image,
// or at what a machine that was taken over has written into its own disk.
func layers(d *os.Root, from string) []string {
	var chain []string
	for len(chain) < maxDepth {
		f, err := openLayer(d, from, os.O_RDONLY)
		if err != nil {
			break
		}
		_, backing, err := readOverlay(f)
		f.Close()
		if err != nil || !isLayer(backing) || slices.Contains(chain, backing) {
			break
		}
		if _, err := d.Lstat(backing); err != nil {
			break
		}
		chain = append(chain, backing)
		from = backing
	}
	return chain
}

// sweep removes the layers on which neither the disk nor a snapshot stands, and
// what an interrupted operation left.
func sweep(d *os.Root) error {
	names, err := entries(d)
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	for _, l := range layers(d, diskName) {
		keep[l] = true
	}
	for _, n := range names {
		if !strings.HasPrefix(n, mark) {
			continue
		}
		layer, err := d.Readlink(n)
		if err != nil {
			return err
		}
		keep[layer] = true
		for _, l := range layers(d, layer) {
			keep[l] = true
		}
	}
	var errs []error
	for _, n := range names {
		if n == newName || isLayer(n) && !keep[n] {
			if err := d.Remove(n); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
