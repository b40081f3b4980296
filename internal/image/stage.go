package image

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/image/ext4"
)

const tmpPrefix = "tmp-"

// stage is a tmp directory in which one image is made. Whoever opened it
// discards it in the end, published or not.
type stage struct {
	dir  string
	lock *os.File // the directory, flocked: this process lives
	disk *os.File
	fs   *ext4.Writer
}

// stage makes a tmp directory with an empty disk.
func (s *Store) stage() (*stage, error) {
	for range 100 {
		st, err := s.tryStage()
		if errors.Is(err, errSwept) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("make temporary directory: %w", err)
		}
		s.step("staged")
		return st, nil
	}
	return nil, errSwept
}

// errSwept: another process opened the store between mkdir and flock.
var errSwept = errors.New("temporary directory was swept")

func (s *Store) tryStage() (_ *stage, err error) {
	dir, err := os.MkdirTemp(s.o.Dir, tmpPrefix)
	if err != nil {
		return nil, err
	}
	st := &stage{dir: dir}
	defer func() {
		if err != nil {
			err = errors.Join(err, st.discard())
		}
	}()
	if st.lock, err = lockDir(dir); err != nil {
		return nil, err
	}
	if st.lock == nil {
		return nil, errSwept
	}
	if st.disk, err = os.OpenFile(filepath.Join(dir, diskFile), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil, err
	}
	st.fs = ext4.New(st.disk, ext4.Options{Label: "agentiso", MaxBytes: s.o.MaxBytes, MaxFiles: s.o.MaxFiles})
	return st, nil
}

// lockDir locks the directory for this process's life. It returns nil without
// error if another holds it or it is gone.
func lockDir(dir string) (*os.File, error) {
	d, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		d.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = nil
		}
		return nil, err
	}
	// The lock may be that of a directory which was removed a moment ago.
	if !samePlace(d, dir) {
		d.Close()
		return nil, nil
	}
	return d, nil
}

// samePlace reports whether dir still is the directory that d is.
func samePlace(d *os.File, dir string) bool {
	here, err := d.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(dir)
	return err == nil && os.SameFile(here, there)
}

// discard removes what is left of the stage; after publish, nothing is.
func (st *stage) discard() error {
	if st.disk != nil {
		st.disk.Close()
	}
	err := removeTree(st.dir)
	if st.lock != nil {
		st.lock.Close()
	}
	return err
}

// sweep removes the tmp directories of dead processes and names of nothing.
func (s *Store) sweep() error {
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tmpPrefix) {
			continue
		}
		dir := s.path(e.Name())
		d, err := lockDir(dir)
		if err != nil {
			return err
		}
		if d == nil {
			continue
		}
		err = removeTree(dir)
		d.Close()
		if err != nil {
			return err
		}
		s.log.Info("removed an unfinished image", "dir", dir)
	}
	return s.exclusively(s.sweepNames)
}

func (s *Store) sweepNames() error {
	names, err := s.names()
	if err != nil {
		return err
	}
	for name, digest := range names {
		if _, err := os.Stat(s.path(dirName(digest))); errors.Is(err, fs.ErrNotExist) {
			if err := s.removeName(name); err != nil {
				return err
			}
		}
	}
	left, err := filepath.Glob(s.path("names", ".new-*"))
	if err != nil {
		return err
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// publish finishes the disk, names it by its content and makes it appear.
// If the very same image is there already, that one is returned. CreatedAt,
// Digest and the sizes of m are set here.
func (s *Store) publish(ctx context.Context, st *stage, m manifest, p domain.ProgressFunc) (*manifest, error) {
	p.Report(domain.Progress{Stage: "finishing the disk"})
	stats, err := st.fs.Finish(ctx)
	if err != nil {
		return nil, err
	}
	if err := st.disk.Sync(); err != nil {
		return nil, fmt.Errorf("sync disk: %w", err)
	}
	s.step("synced")
	p.Report(domain.Progress{Stage: "computing the digest"})
	m.Version, m.CreatedAt = formatVersion, time.Now().UTC().Truncate(time.Second)
	m.SizeBytes, m.ContentBytes, m.Files = stats.SizeBytes, stats.ContentBytes, stats.Files
	if m.Digest, err = contentDigest(ctx, st.disk, m.SizeBytes, m.Config); err != nil {
		return nil, err
	}
	if err := st.seal(m); err != nil {
		return nil, err
	}
	s.step("sealed")
	err = s.exclusively(func() error {
		target := s.path(dirName(m.Digest))
		if info, err := os.Stat(filepath.Join(target, diskFile)); err == nil && info.Size() == m.SizeBytes {
			// The same content by another way: keep the disk that machines
			// may be reading; only what is known about it is newer.
			if old, err := s.load(m.Digest); err == nil {
				m.CreatedAt, m.Extras = old.CreatedAt, old.Extras
			}
			return s.replaceManifest(st, m)
		}
		if err := os.Rename(st.dir, target); err != nil {
			return err
		}
		return syncDir(s.o.Dir)
	})
	if err != nil {
		return nil, fmt.Errorf("publish image %s: %w", m.Digest, err)
	}
	s.step("published")
	return &m, nil
}

// seal writes the manifest and takes away the right to write.
func (st *stage) seal(m manifest) error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(st.dir, manifestFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return err
	}
	_, err = f.Write(append(text, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	if err := st.disk.Chmod(0o444); err != nil {
		return err
	}
	if err := os.Chmod(st.dir, 0o755); err != nil {
		return err
	}
	return st.lock.Sync() // the directory
}

// replaceManifest gives an image that is there the manifest m.
func (s *Store) replaceManifest(st *stage, m manifest) error {
	if err := os.Remove(filepath.Join(st.dir, manifestFile)); err != nil {
		return err
	}
	if err := st.seal(m); err != nil {
		return err
	}
	target := s.path(dirName(m.Digest))
	if err := os.Rename(filepath.Join(st.dir, manifestFile), filepath.Join(target, manifestFile)); err != nil {
		return err
	}
	return syncDir(target)
}

// condemn moves an image out of sight, into a tmp directory to be removed.
func (s *Store) condemn(digest string) (string, error) {
	dir, err := os.MkdirTemp(s.o.Dir, tmpPrefix)
	if err != nil {
		return "", err
	}
	if err := os.Rename(s.path(dirName(digest)), filepath.Join(dir, "image")); err != nil {
		return "", errors.Join(err, os.Remove(dir))
	}
	return dir, syncDir(s.o.Dir)
}

// reprieve undoes condemn.
func (s *Store) reprieve(dir, digest string) error {
	if err := os.Rename(filepath.Join(dir, "image"), s.path(dirName(digest))); err != nil {
		return err
	}
	return syncDir(s.o.Dir)
}

// removeTree removes dir. It refuses when something is mounted below it, which
// a bootstrap killed at a bad moment could leave: the host's own files would be
// next.
func removeTree(dir string) error {
	resolved, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	below := strings.NewReplacer(" ", `\040`, "\t", `\011`, `\`, `\134`).Replace(resolved) + "/"
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if c := strings.Fields(sc.Text()); len(c) > 4 && strings.HasPrefix(c[4], below) {
			return fmt.Errorf("remove %s: %s is mounted", dir, c[4])
		}
	}
	return os.RemoveAll(dir)
}
