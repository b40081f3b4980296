package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"time"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// Import makes an image of a tar archive, plain or compressed with gzip, xz,
// zstd or bzip2: the root file system itself, or an image as `docker save` and
// OCI layouts have it. r must end when ctx does. A failed or cancelled import
// leaves nothing. The faults are invalid, limit and no_space.
func (s *Store) Import(ctx context.Context, name string, r io.Reader, p domain.ProgressFunc) (domain.Image, error) {
	if err := checkName(name); err != nil {
		return domain.Image{}, err
	}
	ctx, leave, err := s.flights.enter(ctx)
	if err != nil {
		return domain.Image{}, err
	}
	defer leave()
	release, err := s.flights.slot(ctx, p)
	if err != nil {
		return domain.Image{}, s.explain("import "+name, err)
	}
	defer release()
	m, err := s.importTar(ctx, r, p)
	if err != nil {
		return domain.Image{}, s.explain("import "+name, err)
	}
	return s.named(name, m)
}

// archiveEntry matches what image archives begin with, and root file systems
// do not.
var archiveEntry = regexp.MustCompile(`^(\./)?(blobs(/.*)?|oci-layout|index\.json|manifest\.json|repositories|(sha256:)?[0-9a-f]{64}(\.json|\.tar(\.gz)?|/.*)?)$`)

// firstEntry is how much of a tar is looked at for its first name: more than a
// header with its extensions usually takes.
const firstEntry = 32 << 10

func (s *Store) importTar(ctx context.Context, r io.Reader, p domain.ProgressFunc) (_ *manifest, err error) {
	plain, done, err := unpacked(&counter{r: r, progress: p}, false)
	if err != nil {
		return nil, err
	}
	defer done()
	st, err := s.stage()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, st.discard()) }()

	head, err := plain.Peek(firstEntry)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if other := notTar(head); other != "" {
		return nil, fmt.Errorf("%w: it is %s, not a tar archive", errArchive, other)
	}
	u := s.unpacker(st, "importing", nil) // the counter reports
	if h, err := tar.NewReader(bytes.NewReader(head)).Next(); err == nil && archiveEntry.MatchString(h.Name) {
		return s.importArchive(ctx, st, u, plain, p)
	}
	if err := u.apply(ctx, plain, false); err != nil {
		return nil, err
	}
	return s.publish(ctx, st, manifest{Source: "imported root file system"}, p)
}

// notTar names the kind of file that people take for a tar archive.
func notTar(head []byte) string {
	for _, k := range []struct {
		at    int
		magic string
		name  string
	}{
		{0, "PK\x03\x04", "a zip archive"}, {0, "QFI\xfb", "a qcow2 disk image"}, {0, "hsqs", "a squashfs image"},
		{0, "070701", "a cpio archive"}, {0, "KDMV", "a VMDK disk image"}, {0, "\x7fELF", "a program"},
		{0x438, "\x53\xef", "an ext4 file system"}, {0x1fe, "\x55\xaa", "a disk image with a boot sector"},
		{0x8001, "CD001", "an ISO image"}, {0, "<!DOCTYPE", "a web page"}, {0, "<html", "a web page"},
	} {
		if len(head) >= k.at+len(k.magic) && string(head[k.at:k.at+len(k.magic)]) == k.magic && !isTar(head) {
			return k.name
		}
	}
	return ""
}

func isTar(head []byte) bool { return len(head) > 262 && string(head[257:262]) == "ustar" }

// importArchive keeps the whole archive in a file, because its parts come in
// any order, and makes the image that it holds.
func (s *Store) importArchive(ctx context.Context, st *stage, u *unpacker, r io.Reader, p domain.ProgressFunc) (*manifest, error) {
	spool := filepath.Join(st.dir, "archive.tar")
	if err := writeAll(ctx, spool, r, s.o.MaxBytes); err != nil {
		return nil, err
	}
	defer os.Remove(spool)
	a, err := openArchive(ctx, spool, filepath.Join(st.dir, "layout"), s.o.MaxBytes)
	if errors.Is(err, errNoImage) {
		// A root file system that happens to begin like an image archive.
		f, err := os.Open(spool)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		if err := u.apply(ctx, f, false); err != nil {
			return nil, err
		}
		return s.publishWithout(ctx, st, manifest{Source: "imported root file system"}, p)
	}
	if err != nil {
		return nil, archiveFault(err)
	}
	u.progress, u.stage = p, "unpacking layers"
	err = u.unpackOCI(ctx, ociImage{a.config.RootFS.DiffIDs, func(_ context.Context, i int) (io.ReadCloser, error) {
		return a.layers[i].Uncompressed()
	}})
	if err != nil {
		return nil, archiveFault(err)
	}
	return s.publishWithout(ctx, st, manifest{Source: "imported image " + a.id.String(), Config: ociConfig(a.config)}, p)
}

// publishWithout publishes the stage without what was spooled in it.
func (s *Store) publishWithout(ctx context.Context, st *stage, m manifest, p domain.ProgressFunc) (*manifest, error) {
	for _, name := range []string{"archive.tar", "layout"} {
		if err := os.RemoveAll(filepath.Join(st.dir, name)); err != nil {
			return nil, err
		}
	}
	return s.publish(ctx, st, m, p)
}

// archiveFault marks what the libraries found wrong with an archive's content
// as the archive's fault; the host's failures stay what they are.
func archiveFault(err error) error {
	if _, ok := errors.AsType[*fault.Error](err); ok || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if pe, ok := errors.AsType[*fs.PathError](err); ok && !errors.Is(pe, fs.ErrNotExist) {
		return err
	}
	return fmt.Errorf("%w: %w", errArchive, err)
}

// writeAll copies r to a new file, limit bytes at the most.
func writeAll(ctx context.Context, path string, r io.Reader, limit int64) (err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = io.Copy(f, &meter{ctx: ctx, r: r, left: &limit})
	return err
}

// counter reports how much of a stream has been read.
type counter struct {
	r        io.Reader
	n        int64
	progress domain.ProgressFunc
	reported time.Time
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	if now := time.Now(); now.Sub(c.reported) > 100*time.Millisecond {
		c.reported = now
		c.progress.Report(domain.Progress{Stage: "reading the archive", Done: c.n, Unit: "bytes"})
	}
	return n, err
}
