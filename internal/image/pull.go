package image

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

const (
	layerTries = 4
	// downloads is how many layers come at the same time.
	downloads = 3
)

// Pull fetches an OCI image for linux on this architecture and gives it a
// name. What the registry's manifest says is here already is not fetched
// again. Credentials are those of o; none are looked for. Transient failures
// are tried again with growing pauses; a failed or cancelled pull leaves
// nothing. The faults are invalid, unauthorized, not_found, unavailable,
// unsupported, limit and no_space.
func (s *Store) Pull(ctx context.Context, o domain.PullOptions, p domain.ProgressFunc) (domain.Image, error) {
	ref, given, err := parseReference(o)
	if err != nil {
		return domain.Image{}, err
	}
	if o.Name != "" {
		given = o.Name
	}
	if err := checkName(given); err != nil {
		return domain.Image{}, err
	}
	// Credentials are part of the key: who has none must not be served by the
	// pull of somebody who has.
	key := fmt.Sprintf("pull %s %t %x", ref, o.Insecure, sha256.Sum256(fmt.Appendf(nil, "%q", o.Auth)))
	m, err := s.flights.do(ctx, key, p, func(ctx context.Context, p domain.ProgressFunc) (*manifest, error) {
		m, err := s.pull(ctx, ref, o, p)
		if err != nil {
			return nil, s.explainRegistry(ref, err)
		}
		return m, nil
	})
	if err != nil {
		return domain.Image{}, err
	}
	return s.named(given, m)
}

// named gives the image a name and returns it.
func (s *Store) named(name string, m *manifest) (domain.Image, error) {
	var i domain.Image
	err := s.exclusively(func() error {
		if _, err := s.load(m.Digest); err != nil { // removed a moment ago
			return err
		}
		if err := s.setName(name, m.Digest); err != nil {
			return err
		}
		names, err := s.names()
		if err == nil {
			i = s.image(m, names)
		}
		return err
	})
	return i, s.explain("name image "+name, err)
}

func (s *Store) pull(ctx context.Context, ref name.Reference, o domain.PullOptions, p domain.ProgressFunc) (_ *manifest, err error) {
	p.Report(domain.Progress{Stage: "resolving " + ref.String()})
	img, err := s.resolveRemote(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	digest, err := img.Digest()
	if err != nil {
		return nil, err
	}
	if m := s.byManifest(digest.String()); m != nil {
		return m, nil
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	if err := checkManifest(m, ref.String()); err != nil {
		return nil, err
	}
	c, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	if err := checkConfig(c, len(m.Layers), ref.String()); err != nil {
		return nil, err
	}
	layers, err := img.Layers()
	if err != nil {
		return nil, err
	}
	var total int64
	for _, l := range m.Layers {
		if total += l.Size; l.Size < 0 || total > s.o.MaxBytes {
			return nil, errTooLarge
		}
	}

	st, err := s.stage()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, st.discard()) }()
	d := newDownload(layers, st.dir, total, p)
	d.pause = s.pause
	defer d.close()
	d.start(ctx, m)

	u := s.unpacker(st, "unpacking layers", d.unpackProgress)
	if err := u.unpackOCI(ctx, ociImage{c.RootFS.DiffIDs, d.open}); err != nil {
		return nil, err
	}
	return s.publish(ctx, st, manifest{
		Source:         ref.Context().Name() + "@" + digest.String(),
		ManifestDigest: digest.String(),
		Config:         ociConfig(c),
	}, p)
}

// byManifest finds the image that was made from an OCI manifest.
func (s *Store) byManifest(digest string) *manifest {
	ms, err := s.manifests()
	if err != nil {
		return nil
	}
	for _, m := range ms {
		if m.ManifestDigest == digest {
			return m
		}
	}
	return nil
}

// download fetches layers into files of dir, a few at a time and the lowest
// first. Its goroutines end with close.
type download struct {
	layers   []v1.Layer
	dir      string
	progress domain.ProgressFunc
	pause    time.Duration
	cancel   context.CancelFunc
	wg       sync.WaitGroup
	got      []chan error // one for each layer, of one value

	mu       sync.Mutex
	done     int64 // bytes
	total    int64
	reported time.Time
}

func newDownload(layers []v1.Layer, dir string, total int64, p domain.ProgressFunc) *download {
	d := &download{layers: layers, dir: dir, total: total, progress: p, got: make([]chan error, len(layers))}
	for i := range d.got {
		d.got[i] = make(chan error, 1)
	}
	return d
}

func (d *download) start(ctx context.Context, m *v1.Manifest) {
	ctx, d.cancel = context.WithCancel(ctx)
	next := make(chan int, len(d.layers))
	for i := range d.layers {
		next <- i
	}
	close(next)
	d.add(0)
	for range min(downloads, len(d.layers)) {
		d.wg.Go(func() {
			for i := range next {
				d.got[i] <- d.fetch(ctx, i, m.Layers[i])
			}
		})
	}
}

func (d *download) close() {
	if d.cancel != nil {
		d.cancel()
	}
	d.wg.Wait()
}

func (d *download) path(i int) string { return filepath.Join(d.dir, "layer-"+strconv.Itoa(i)) }

// open waits for layer i and opens it; closing removes the file.
func (d *download) open(ctx context.Context, i int) (io.ReadCloser, error) {
	select {
	case err := <-d.got[i]:
		if err != nil {
			return nil, err
		}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	f, err := os.Open(d.path(i))
	if err != nil {
		return nil, err
	}
	return &spool{f}, nil
}

// spool is a file that goes away when closed.
type spool struct{ *os.File }

func (s *spool) Close() error { return errors.Join(s.File.Close(), os.Remove(s.Name())) }

// add counts bytes that have come, negative ones when they are thrown away,
// and tells the caller now and then.
func (d *download) add(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.done += n
	if now := time.Now(); d.done == d.total || now.Sub(d.reported) > 100*time.Millisecond {
		d.reported = now
		d.progress.Report(domain.Progress{Stage: "downloading layers", Done: d.done, Total: d.total, Unit: "bytes"})
	}
}

// unpackProgress passes the unpacker's progress on once nothing is left to
// download, so that the two do not take turns.
func (d *download) unpackProgress(p domain.Progress) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.done == d.total {
		d.progress.Report(p)
	}
}

// fetch gets one layer, trying again from its beginning when the transfer
// breaks off.
func (d *download) fetch(ctx context.Context, i int, desc v1.Descriptor) error {
	for try := 1; ; try++ {
		err := d.fetchOnce(ctx, i, desc)
		if err == nil || ctx.Err() != nil || try == layerTries || !transient(err) {
			if err != nil {
				return fmt.Errorf("layer %s: %w", desc.Digest, err)
			}
			return nil
		}
		pause := d.pause << (try - 1)
		d.mu.Lock()
		d.progress.Report(domain.Progress{Stage: "downloading layers", Done: d.done, Total: d.total, Unit: "bytes",
			Log: fmt.Sprintf("layer %s: %v; trying again", desc.Digest, err)})
		d.mu.Unlock()
		select {
		case <-time.After(pause + rand.N(pause/2+1)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// transient reports whether another try may help.
func transient(err error) bool {
	if te, ok := errors.AsType[*transport.Error](err); ok {
		return te.Temporary()
	}
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return false
	}
	return errors.Is(err, errTransfer) && !errors.Is(err, errPlainHTTP)
}

func (d *download) fetchOnce(ctx context.Context, i int, desc v1.Descriptor) (err error) {
	var n int64
	defer func() {
		if err != nil {
			d.add(-n)
		}
	}()
	rc, err := d.layers[i].Compressed()
	if err != nil {
		return fmt.Errorf("%w: %w", errTransfer, err)
	}
	defer rc.Close()
	f, err := os.OpenFile(d.path(i), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()

	// A body that stalls is closed under its reader.
	stalled := time.AfterFunc(answerTimeout, func() { rc.Close() })
	defer stalled.Stop()
	unhook := context.AfterFunc(ctx, func() { rc.Close() })
	defer unhook()
	h := sha256.New()
	buf := make([]byte, 256<<10)
	for {
		k, rerr := rc.Read(buf)
		stalled.Reset(answerTimeout)
		if n += int64(k); n > desc.Size {
			return fmt.Errorf("%w: more than %d bytes", errDigest, desc.Size)
		}
		d.add(int64(k))
		h.Write(buf[:k])
		if _, err := f.Write(buf[:k]); err != nil {
			return err
		}
		switch {
		case rerr == nil:
			continue
		case ctx.Err() != nil:
			return ctx.Err()
		case n == desc.Size: // the end, or the library's own check of the digest
			return checkDigest(h, desc.Digest)
		case errors.Is(rerr, io.EOF):
			rerr = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("%w after %d of %d bytes: %w", errTransfer, n, desc.Size, rerr)
	}
}
