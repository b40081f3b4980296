package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

const (
	// maxConfigBytes bounds an image's configuration; real ones are some KB.
	maxConfigBytes = 8 << 20
	// maxProcessBytes bounds what is kept of a configuration, as JSON. It stands
	// in every list of images and in every workspace's record, and the agent
	// takes 1 MiB; real ones are under 8 KiB.
	maxProcessBytes = 64 << 10
	// maxLayers is far above the 127 that container engines stop at.
	maxLayers = 1024
)

// ociImage is an OCI image with its layers ready to be read, the lowest first.
type ociImage struct {
	diffIDs []v1.Hash
	// open returns layer i as it is stored, compressed or not. It may wait
	// until that layer is there.
	open func(ctx context.Context, i int) (io.ReadCloser, error)
}

// checkManifest refuses a manifest that is not a container image's, before
// anything that it names is read.
func checkManifest(m *v1.Manifest, what string) error {
	if m.Config.Size > maxConfigBytes || len(m.Layers) > maxLayers {
		return fault.New(fault.Limit, "%s has a configuration of %d bytes and %d layers; %d and %d are allowed",
			what, m.Config.Size, len(m.Layers), maxConfigBytes, maxLayers).WithNext("Use another image.")
	}
	if !m.Config.MediaType.IsConfig() && m.Config.MediaType != "" {
		return fault.New(fault.Invalid, "%s is not a container image but %s", what, m.Config.MediaType).
			WithNext("Use a reference to a container image.")
	}
	for _, l := range m.Layers {
		if !l.MediaType.IsLayer() {
			return fault.New(fault.Unsupported, "%s has a layer of the kind %s", what, l.MediaType).
				WithNext("Use an image with plain, gzip or zstd layers.")
		}
	}
	return nil
}

// checkConfig refuses a configuration for another platform, one that does not
// fit the image's layers, or one that no process could be started with.
func checkConfig(c *v1.ConfigFile, layers int, what string) error {
	if c.OS != "" && c.OS != platform.OS || c.Architecture != "" && c.Architecture != platform.Architecture {
		return noPlatform(what, []string{c.OS + "/" + c.Architecture})
	}
	if len(c.RootFS.DiffIDs) != layers || layers > maxLayers {
		return fault.New(fault.Invalid, "%s has %d layers but names %d", what, layers, len(c.RootFS.DiffIDs)).
			WithNext("The image is damaged: push or export it again.")
	}
	return checkProcess(ociConfig(c), what)
}

func checkProcess(c config, what string) error {
	text, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if len(text) > maxProcessBytes {
		return fault.New(fault.Limit, "%s has %d bytes of environment, user, directory and command; %d are allowed", what, len(text), maxProcessBytes).
			WithNext("Use another image.")
	}
	all := slices.Concat([]string{c.User, c.Workdir}, c.Entrypoint, c.Cmd, slices.Collect(maps.Keys(c.Env)), slices.Collect(maps.Values(c.Env)))
	if slices.ContainsFunc(all, func(s string) bool { return strings.ContainsRune(s, 0) }) {
		return fault.New(fault.Invalid, "%s has a zero byte in its environment, user, directory or command", what).
			WithNext("Use another image.")
	}
	return nil
}

// platform is the one that guests have.
var platform = v1.Platform{OS: "linux", Architecture: runtime.GOARCH}

// unpackOCI applies all layers, checking each against its digest.
func (u *unpacker) unpackOCI(ctx context.Context, img ociImage) error {
	for i, id := range img.diffIDs {
		if err := u.layer(ctx, img, i, id); err != nil {
			return fmt.Errorf("layer %d of %d: %w", i+1, len(img.diffIDs), err)
		}
		u.fs.NextLayer()
	}
	return nil
}

func (u *unpacker) layer(ctx context.Context, img ociImage, i int, id v1.Hash) error {
	rc, err := img.open(ctx, i)
	if err != nil {
		return err
	}
	defer rc.Close()
	r, done, err := unpacked(rc, true)
	if err != nil {
		return err
	}
	defer done()
	h := sha256.New()
	if err := u.apply(ctx, io.TeeReader(r, h), true); err != nil {
		return err
	}
	return checkDigest(h, id)
}

var errDigest = errors.New("the content does not have the digest that the image names")

func checkDigest(h hash.Hash, want v1.Hash) error {
	if got := hex.EncodeToString(h.Sum(nil)); want.Algorithm != "sha256" || got != want.Hex {
		return fmt.Errorf("%w: sha256:%s instead of %s", errDigest, got, want)
	}
	return nil
}

func ociConfig(c *v1.ConfigFile) config {
	return config{
		User:       c.Config.User,
		Workdir:    c.Config.WorkingDir,
		Env:        environment(c.Config.Env),
		Entrypoint: c.Config.Entrypoint,
		Cmd:        c.Config.Cmd,
	}
}

// unpacker makes an unpacker into st.
func (s *Store) unpacker(st *stage, stageName string, p domain.ProgressFunc) *unpacker {
	return &unpacker{
		fs:          st.fs,
		dir:         st.dir,
		streamBytes: s.o.MaxBytes + s.o.MaxFiles*1024, // a header or two for each file
		stage:       stageName,
		progress:    p,
	}
}
