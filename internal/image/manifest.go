package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/image/ext4"
)

const (
	diskFile     = "disk.ext4"
	manifestFile = "image.json"
	// formatVersion is that of image.json and of what recipes make; a change
	// makes recipes build anew.
	formatVersion = 1
)

// manifest is image.json.
type manifest struct {
	Version      int       `json:"version"`
	Digest       string    `json:"digest"`
	CreatedAt    time.Time `json:"created_at"`
	SizeBytes    int64     `json:"size_bytes"`    // of the file system
	ContentBytes int64     `json:"content_bytes"` // what is in use of it
	Files        int64     `json:"files"`
	Source       string    `json:"source"` // for people
	RecipeDigest string    `json:"recipe_digest,omitempty"`
	// ManifestDigest is that of the OCI manifest an image was pulled by.
	ManifestDigest string   `json:"manifest_digest,omitempty"`
	Extras         []string `json:"extras,omitempty"`
	Config         config   `json:"config"`
}

// config is what a process in the image starts with. It is part of the
// digest: maps and all are encoded in one order.
type config struct {
	User       string            `json:"user,omitempty"`
	Workdir    string            `json:"workdir,omitempty"`
	Env        map[string]string `json:"env,omitempty"`
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Cmd        []string          `json:"cmd,omitempty"`
}

// load reads the manifest of digest; fs.ErrNotExist if there is none.
func (s *Store) load(digest string) (*manifest, error) {
	if !validDigest(digest) {
		return nil, fs.ErrNotExist
	}
	text, err := os.ReadFile(s.path(dirName(digest), manifestFile))
	if err != nil {
		return nil, err
	}
	m := &manifest{}
	if err := json.Unmarshal(text, m); err != nil {
		return nil, fmt.Errorf("read manifest of image %s: %w", digest, err)
	}
	if m.Version != formatVersion || m.Digest != digest {
		return nil, fmt.Errorf("read manifest of image %s: version %d of %s", digest, m.Version, m.Digest)
	}
	return m, nil
}

// digests lists what is there by directory.
func (s *Store) digests() ([]string, error) {
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil {
		return nil, err
	}
	var ds []string
	for _, e := range entries {
		if d := strings.Replace(e.Name(), "-", ":", 1); e.IsDir() && validDigest(d) {
			ds = append(ds, d)
		}
	}
	return ds, nil
}

// manifests reads all of them, the newest first. One that is damaged is left
// out and logged: the others must stay usable.
func (s *Store) manifests() ([]*manifest, error) {
	ds, err := s.digests()
	if err != nil {
		return nil, err
	}
	var ms []*manifest
	for _, d := range ds {
		m, err := s.load(d)
		switch {
		case errors.Is(err, fs.ErrNotExist): // removed since
		case err != nil:
			s.log.Warn("skip damaged image", "image", d, "err", err)
		default:
			ms = append(ms, m)
		}
	}
	slices.SortFunc(ms, func(a, b *manifest) int {
		if c := b.CreatedAt.Compare(a.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(a.Digest, b.Digest)
	})
	return ms, nil
}

// contentDigest names a disk with its configuration: SHA-256 over the size,
// each block that is not all zeros after its offset, and the configuration.
func contentDigest(ctx context.Context, disk *os.File, size int64, c config) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "agentiso image\n%d\n", size)
	buf := make([]byte, 256*ext4.BlockSize)
	zero := make([]byte, ext4.BlockSize)
	for at := int64(0); at < size; {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		data, err := unix.Seek(int(disk.Fd()), at, unix.SEEK_DATA)
		switch {
		case errors.Is(err, unix.ENXIO):
			data = size
		case err != nil: // the host's file system cannot tell: read it all
			data = at
		}
		at = max(at, data&^(ext4.BlockSize-1))
		n, err := disk.ReadAt(buf[:min(int64(len(buf)), size-at)], at)
		if err != nil && !errors.Is(err, io.EOF) {
			return "", fmt.Errorf("read disk: %w", err)
		}
		for p := buf[:n]; len(p) > 0; p = p[min(len(p), ext4.BlockSize):] {
			block := p[:min(len(p), ext4.BlockSize)]
			if string(block) == string(zero[:len(block)]) {
				at += int64(len(block))
				continue
			}
			var off [8]byte
			for i := range off {
				off[i] = byte(at >> (8 * i))
			}
			h.Write(off[:])
			h.Write(block)
			at += int64(len(block))
		}
		if n == 0 {
			break
		}
	}
	text, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	h.Write(text)
	return digestPrefix + hex.EncodeToString(h.Sum(nil)), nil
}

// environment turns NAME=VALUE lines into a map; what has no name is left out.
func environment(env []string) map[string]string {
	m := make(map[string]string, len(env))
	for _, kv := range env {
		if k, v, ok := strings.Cut(kv, "="); ok && k != "" {
			m[k] = v
		}
	}
	return m
}
