package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// DefaultName is the image that the empty reference means unless the options
// say otherwise.
const DefaultName = "dev"

// Options configure a Store. Only Dir is required.
type Options struct {
	// Dir is the store's own directory. Machines' Unix users read below it.
	Dir string
	// Default is the name that the empty reference means.
	Default string
	// MaxBytes and MaxFiles bound what one image may unpack to. Defaults 64 GiB
	// and 4 million.
	MaxBytes int64
	MaxFiles int64
	// Builds is how many images are made at the same time; more wait. Default 2.
	Builds int
	// Busybox is the static busybox of the minimal recipe; "" finds one.
	Busybox string
	// RecipeFiles are asked for what is put into the images of the recipes so
	// named, over what they have; it counts for the recipe's digest.
	RecipeFiles map[string]func() ([]File, error)
	// Transport carries requests to registries. Default: one of its own with
	// the proxies of the environment.
	Transport http.RoundTripper
	Log       *slog.Logger
}

// Store is the images of one data directory. Its methods may be called
// concurrently.
type Store struct {
	o       Options
	log     *slog.Logger
	mu      sync.Mutex // names and directories while they change
	flights flights
	pause   time.Duration // before the second try of a transfer; doubles
	step    func(string)  // told after each step that a crash may follow; tests die there
}

// Open opens the store in o.Dir, making it if need be, and removes what dead
// processes have left unfinished.
func Open(o Options) (*Store, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.Default = cmp.Or(o.Default, DefaultName)
	o.MaxBytes = cmp.Or(o.MaxBytes, 64<<30)
	o.MaxFiles = cmp.Or(o.MaxFiles, 4<<20)
	o.Builds = cmp.Or(o.Builds, 2)
	if o.Transport == nil {
		o.Transport = defaultTransport()
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	o.Dir = dir
	if err := os.MkdirAll(filepath.Join(dir, "names"), 0o755); err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	s := &Store{o: o, log: o.Log, pause: time.Second, step: func(string) {}}
	s.flights.init(o.Builds)
	if err := s.sweep(); err != nil {
		return nil, fmt.Errorf("open image store: %w", err)
	}
	return s, nil
}

// Close cancels the builds under way and waits until they have cleaned up.
func (s *Store) Close() error {
	s.flights.close()
	if t, ok := s.o.Transport.(interface{ CloseIdleConnections() }); ok {
		t.CloseIdleConnections()
	}
	return nil
}

func (s *Store) path(elem ...string) string {
	return filepath.Join(append([]string{s.o.Dir}, elem...)...)
}

// exclusively runs fn while nobody else changes names or images.
func (s *Store) exclusively(fn func() error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	f, err := os.OpenFile(s.path("lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err == nil {
			return fn()
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("lock image store: %w", err)
		}
	}
}

// Image finds an image by name, digest or digest prefix of at least four
// digits; the empty reference is the default name. A name without a tag also
// finds the one tagged latest. The faults are not_found and ambiguous.
func (s *Store) Image(_ context.Context, ref string) (domain.Image, error) {
	names, err := s.names()
	if err != nil {
		return domain.Image{}, fmt.Errorf("find image %q: %w", ref, err)
	}
	m, _, err := s.resolve(ref, names)
	if err != nil {
		return domain.Image{}, err
	}
	return s.image(m, names), nil
}

// Images lists all images, the newest first.
func (s *Store) Images(context.Context) ([]domain.Image, error) {
	names, err := s.names()
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	ms, err := s.manifests()
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	images := make([]domain.Image, 0, len(ms))
	for _, m := range ms {
		images = append(images, s.image(m, names))
	}
	return images, nil
}

// Extra returns the path of a file that the recipe of an image took out of its
// disk: "vmlinuz" and "initrd.img" of the stock recipe.
func (s *Store) Extra(ctx context.Context, ref, name string) (string, error) {
	i, err := s.Image(ctx, ref)
	if err != nil {
		return "", err
	}
	path := filepath.Join(filepath.Dir(i.Disk.Path), name)
	if _, err := os.Stat(path); err != nil || name != filepath.Base(name) {
		return "", fault.New(fault.NotFound, "image %s has no extra file %q", ref, name).
			WithNext("Build the image %q, which has one.", recipeStock)
	}
	return path, nil
}

// resolve finds the manifest that ref means, and the name by which it was
// found, "" when it was by digest.
func (s *Store) resolve(ref string, names map[string]string) (m *manifest, name string, err error) {
	if ref == "" {
		ref = s.o.Default
	}
	for _, n := range []string{ref, ref + ":latest"} {
		digest, ok := names[n]
		if !ok {
			continue
		}
		m, err := s.load(digest)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, "", fmt.Errorf("find image %q: %w", ref, err)
		}
		return m, n, nil
	}
	prefix := strings.TrimPrefix(ref, digestPrefix)
	if !isHex(prefix) || len(prefix) < 4 {
		return nil, "", s.unknown(ref)
	}
	digests, err := s.digests()
	if err != nil {
		return nil, "", fmt.Errorf("find image %q: %w", ref, err)
	}
	var found []string
	for _, d := range digests {
		if strings.HasPrefix(d, digestPrefix+prefix) {
			found = append(found, d)
		}
	}
	switch len(found) {
	case 0:
		return nil, "", s.unknown(ref)
	case 1:
		if m, err = s.load(found[0]); err != nil {
			return nil, "", fmt.Errorf("find image %q: %w", ref, err)
		}
		return m, "", nil
	}
	slices.Sort(found)
	return nil, "", fault.New(fault.Ambiguous, "%q is the beginning of %d image digests: %s", ref, len(found), strings.Join(found, ", ")).
		WithNext("Give more digits, or a name; `agentiso image ls` lists them.")
}

func (s *Store) unknown(ref string) error {
	e := fault.New(fault.NotFound, "no image %q", ref)
	if _, ok := recipes[ref]; ok {
		return e.WithNext("Make it with `agentiso image build %s`.", ref)
	}
	return e.WithNext("`agentiso image ls` lists the images; `agentiso image pull` fetches one from a registry.")
}

// image makes the view that the other layers have of m.
func (s *Store) image(m *manifest, names map[string]string) domain.Image {
	dir := s.path(dirName(m.Digest))
	i := domain.Image{
		Digest:     m.Digest,
		CreatedAt:  m.CreatedAt,
		SizeBytes:  m.SizeBytes,
		Source:     m.Source,
		User:       m.Config.User,
		Workdir:    m.Config.Workdir,
		Env:        m.Config.Env,
		Entrypoint: m.Config.Entrypoint,
		Cmd:        m.Config.Cmd,
		Disk:       domain.Disk{Path: filepath.Join(dir, diskFile), Format: domain.Raw, SizeBytes: m.SizeBytes},
	}
	var st unix.Stat_t
	if err := unix.Stat(i.Disk.Path, &st); err == nil {
		i.UsedBytes = st.Blocks * 512
	}
	for name, digest := range names {
		if digest == m.Digest {
			i.Names = append(i.Names, name)
		}
	}
	slices.Sort(i.Names)
	return i
}

// Remove takes away the name ref; with its last name, or when ref is a digest,
// the image goes too, and diskRemoved says so. inUse names the workspaces that
// stand on a digest: if there are any, the image stays and the fault is in_use.
// The caller sees to it that no workspace is put on the image meanwhile, by
// having recorded it before Image was asked.
func (s *Store) Remove(_ context.Context, ref string, inUse func(digest string) []string) (digest string, diskRemoved bool, err error) {
	var doomed string
	err = s.exclusively(func() error {
		names, err := s.names()
		if err != nil {
			return err
		}
		m, name, err := s.resolve(ref, names)
		if err != nil {
			return err
		}
		digest = m.Digest
		all := s.image(m, names).Names
		if name != "" && len(all) > 1 {
			return s.removeName(name)
		}
		if users := inUse(digest); len(users) > 0 {
			return fault.New(fault.InUse, "image %s is in use by %s", cmp.Or(ref, s.o.Default), strings.Join(users, ", ")).
				WithNext("Destroy these workspaces first (`agentiso destroy`).")
		}
		// The directory first: a name without an image counts as absent, an
		// image without a name would not.
		if doomed, err = s.condemn(digest); err != nil {
			return err
		}
		// A create that recorded itself since the question found the image still
		// there; one that does so from here on will not find it.
		if users := inUse(digest); len(users) > 0 {
			if err := s.reprieve(doomed, digest); err != nil {
				return err
			}
			return fault.New(fault.InUse, "image %s is in use by %s", cmp.Or(ref, s.o.Default), strings.Join(users, ", ")).
				WithNext("Destroy these workspaces first (`agentiso destroy`).")
		}
		diskRemoved = true
		s.step("condemned")
		for _, n := range all {
			if err := s.removeName(n); err != nil {
				return err
			}
		}
		s.step("unnamed")
		return nil
	})
	if doomed != "" {
		// Unlinking gigabytes takes a while, so it is outside the lock; what a
		// crash leaves is a tmp directory like any other.
		err = errors.Join(err, removeTree(doomed))
	}
	if err != nil {
		return digest, diskRemoved, s.explain("remove image "+ref, err)
	}
	return digest, diskRemoved, nil
}
