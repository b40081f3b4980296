// Package qcow2 keeps each workspace's disk as qcow2 layers over its image. It
// needs no rights and no special file system, and is the default driver.
//
// It fulfils the contract of package storage. It writes layers itself, without
// qemu-img (see format.go), and it never opens guest data.
//
// # On the host
//
//	<dir>/<id>/disk.qcow2        the layer that the machine writes to
//	<dir>/<id>/layer-<x>.qcow2   a frozen layer; <x> is random, the same in every
//	                             directory that has the layer
//	<dir>/<id>/@<name>           a snapshot: a symbolic link to its layer
//	<dir>/<id>/disk.new          what a crash cut off
//
// The lowest layer names the image by its absolute path, the others name the
// one below by its plain name, which QEMU looks for beside the file. A clone
// gets hard links of all the layers it stands on, so that the file system counts
// their users: removing a workspace is removing its directory, whoever else
// stands on its layers.
//
// # Rights
//
// When the daemon is root and a machine has a user of its own, the directory is
// the daemon's with mode 0710 and the machine's group, and disk.qcow2 alone is
// the machine's (0600). So a QEMU that its guest has taken over can neither
// reach another machine's disk nor put a link in the place of its own, for the
// daemon to follow. Frozen layers are the daemon's and read-only (0444); who may
// reach them is decided by the directories.
//
// # Durability
//
// A disk is fsynced before Create returns, unless Options.NoSync: 1.1 ms of the
// 1.4 ms that it takes on the build host's ext4. Without it a new disk is
// durable from its guest's first flush on, and after a loss of power before that
// it may be missing or empty. Snapshots always are durable.
package qcow2

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

const (
	diskName    = "disk.qcow2"
	newName     = "disk.new"
	layerPrefix = "layer-"
	layerSuffix = ".qcow2"
	mark        = "@"

	// roundTo is the unit of disk sizes.
	roundTo = 1 << 20
)

// Options say where disks are kept.
type Options struct {
	// Dir is the directory of all disks, absolute; Open makes it. Nothing else
	// may be put there.
	Dir string
	// NoSync leaves out the fsync of new disks; see the package comment.
	NoSync bool
	Log    *slog.Logger // nil: none
}

// Store keeps disks below one directory. Its methods may be called concurrently
// as the contract says; it has no state of its own beyond the host's.
type Store struct {
	opt  Options
	root *os.Root
	euid int
	// step is called between the steps of an operation; tests fail there.
	step func(string) error
}

// Open returns the store in opt.Dir, which is made if it is absent.
func Open(opt Options) (*Store, error) {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	if !filepath.IsAbs(opt.Dir) {
		return nil, fmt.Errorf("open disks %s: path is not absolute", opt.Dir)
	}
	mode := fs.FileMode(0o700)
	if os.Geteuid() == 0 {
		mode = 0o711 // machines' users pass through to their own
	}
	if err := os.MkdirAll(opt.Dir, mode); err != nil {
		return nil, hostFault("open disks "+opt.Dir, err)
	}
	if err := os.Chmod(opt.Dir, mode); err != nil {
		return nil, hostFault("open disks "+opt.Dir, err)
	}
	root, err := os.OpenRoot(opt.Dir)
	if err != nil {
		return nil, hostFault("open disks "+opt.Dir, err)
	}
	return &Store{opt: opt, root: root, euid: os.Geteuid(), step: func(string) error { return nil }}, nil
}

// Close releases the directory. Disks stay as they are.
func (s *Store) Close() error { return s.root.Close() }

// Create makes an empty layer over base; see the contract in package storage.
func (s *Store) Create(_ context.Context, id string, base domain.Disk, sizeBytes int64) (domain.Disk, error) {
	verb := "create disk " + id
	if err := validID(id); err != nil {
		return domain.Disk{}, err
	}
	if err := checkBase(base); err != nil {
		return domain.Disk{}, err
	}
	sizeBytes, err := roundSize(max(sizeBytes, base.SizeBytes))
	if err != nil {
		return domain.Disk{}, err
	}
	d, err := s.openDir(id, true)
	if err != nil {
		return domain.Disk{}, hostFault(verb, err)
	}
	defer d.Close()
	if err := s.writeLayer(d, diskName, Overlay{sizeBytes, base.Path, base.Format}, !s.opt.NoSync); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return domain.Disk{}, exists(id)
		}
		return domain.Disk{}, hostFault(verb, err)
	}
	return s.disk(id, sizeBytes), nil
}

// Remove deletes the disk of id with its snapshots.
func (s *Store) Remove(_ context.Context, id string) error {
	if err := validID(id); err != nil {
		return err
	}
	if err := s.root.RemoveAll(id); err != nil {
		return hostFault("remove disk "+id, err)
	}
	return nil
}

// Own hands the disk to uid, whose group has the same number.
func (s *Store) Own(_ context.Context, id string, uid int) error {
	verb := fmt.Sprintf("hand disk %s to user %d", id, uid)
	if err := validID(id); err != nil {
		return err
	}
	if uid == 0 {
		uid = s.euid
	}
	if s.euid != 0 && uid != s.euid {
		return fault.New(fault.Missing, "cannot %s: the daemon is user %d and not root", verb, s.euid).
			WithNext("Set uid_base = 0 in section [vm] of the configuration, or run the daemon as root.")
	}
	d, err := s.openDir(id, false)
	if err != nil {
		return notFoundFault(verb, id, err)
	}
	defer d.Close()
	f, err := openLayer(d, diskName, os.O_RDONLY)
	if err != nil {
		return notFoundFault(verb, id, err)
	}
	defer f.Close()
	gid := uid
	if uid == s.euid {
		gid = os.Getegid()
	}
	if err := errors.Join(own(f, uid, gid, 0o600), ownDir(d, s.euid, gid, uid)); err != nil {
		return hostFault(verb, err)
	}
	return nil
}

// UsedBytes is what is allocated to files that no clone shares.
func (s *Store) UsedBytes(_ context.Context, id string) (int64, error) {
	verb := "measure disk " + id
	if err := validID(id); err != nil {
		return 0, err
	}
	d, err := s.openDir(id, false)
	if err != nil {
		return 0, notFoundFault(verb, id, err)
	}
	defer d.Close()
	names, err := entries(d)
	if err != nil {
		return 0, hostFault(verb, err)
	}
	var used int64
	for _, name := range names {
		st, err := d.Lstat(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, hostFault(verb, err)
		}
		if sys, ok := st.Sys().(*unixStat); ok && st.Mode().IsRegular() && sys.Nlink == 1 {
			used += sys.Blocks * 512
		}
	}
	return used, nil
}

// List names the ids that have a directory here.
func (s *Store) List(context.Context) ([]string, error) {
	dir, err := s.root.Open(".")
	if err != nil {
		return nil, hostFault("list disks", err)
	}
	defer dir.Close()
	all, err := dir.ReadDir(-1)
	if err != nil {
		return nil, hostFault("list disks", err)
	}
	var ids []string
	for _, e := range all {
		if e.IsDir() && validID(e.Name()) == nil { // not lost+found
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

func (s *Store) disk(id string, sizeBytes int64) domain.Disk {
	return domain.Disk{Path: filepath.Join(s.opt.Dir, id, diskName), Format: domain.QCOW2, SizeBytes: sizeBytes}
}

// openDir opens the directory of id; all that is done for one id is done
// through it, so that no name can lead elsewhere.
func (s *Store) openDir(id string, create bool) (*os.Root, error) {
	if create {
		if err := s.root.Mkdir(id, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	return s.root.OpenRoot(id)
}

// writeLayer writes an empty overlay under a name that must be free.
func (s *Store) writeLayer(d *os.Root, name string, o Overlay, sync bool) error {
	f, err := openLayer(d, name, os.O_RDWR|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := o.WriteTo(f); err != nil {
		return err
	}
	if sync {
		// With the file, journaling file systems write what its directories
		// gained before.
		return f.Sync()
	}
	return nil
}

func openLayer(d *os.Root, name string, flag int) (*os.File, error) {
	return d.OpenFile(name, flag|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
}

func validID(id string) error {
	if !plainName(id) {
		return fault.New(fault.Invalid, "%.80q is not a valid id for a disk", id).
			WithNext("Use 1 to 63 characters of a-z, 0-9 and '-', not beginning with '-'.")
	}
	return nil
}

func plainName(s string) bool {
	if len(s) == 0 || len(s) > 63 || s[0] == '-' {
		return false
	}
	return strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

func checkBase(base domain.Disk) error {
	o := Overlay{512, base.Path, base.Format}
	if err := o.check(); err != nil || base.Path[0] != '/' {
		return fault.New(fault.Invalid, "disk %.80q cannot be a base: %w", base.Path, errors.Join(err, relative(base.Path))).
			WithNext("Name an image by the absolute path of its raw or qcow2 file.")
	}
	st, err := os.Stat(base.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(fault.NotFound, "the image's disk %s is gone", base.Path).
			WithNext("Build, pull or import the image again.")
	case err != nil:
		return hostFault("use disk "+base.Path, err)
	case base.SizeBytes <= 0 || base.Format == domain.Raw && st.Mode().IsRegular() && st.Size() < base.SizeBytes:
		return fault.New(fault.Internal, "the image's disk %s is damaged: %d bytes and not %d", base.Path, st.Size(), base.SizeBytes).
			WithNext("Remove the image and build, pull or import it again.")
	}
	return nil
}

func relative(path string) error {
	if path == "" || path[0] != '/' {
		return errors.New("its path is not absolute")
	}
	return nil
}

func roundSize(n int64) (int64, error) {
	if n <= 0 || n > maxSizeBytes {
		return 0, fault.New(fault.Invalid, "a disk of %d bytes is not possible", n).
			WithNext("Ask for a size up to %d GiB.", int64(maxSizeBytes)>>30)
	}
	return (n + roundTo - 1) / roundTo * roundTo, nil
}
