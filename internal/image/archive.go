package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/agentiso/agentiso/internal/fault"
)

// maxArchiveEntries is far above what an archive of maxLayers layers has.
const maxArchiveEntries = 16 * maxLayers

var errNoImage = errors.New("no image in the archive")

// archive is an image out of a file.
type archive struct {
	id     v1.Hash // of the configuration
	config *v1.ConfigFile
	layers []v1.Layer
}

// openArchive opens the image in the tar file at spool: what `docker save`
// writes, or an OCI layout, whose blobs are copied to dir.
func openArchive(ctx context.Context, spool, dir string, limit int64) (*archive, error) {
	sizes, err := scanArchive(spool)
	if err != nil {
		return nil, err
	}
	// The libraries read descriptions whole: none may be for costing memory.
	small := func(name string) error {
		if size, ok := sizes[name]; !ok || size > maxConfigBytes {
			return fmt.Errorf("%w: %s is missing or larger than %d bytes", errArchive, name, maxConfigBytes)
		}
		return nil
	}
	var img v1.Image
	switch {
	case small("manifest.json") == nil:
		img, err = openDockerSave(spool, small)
	case small("index.json") == nil:
		img, err = openLayout(ctx, spool, dir, limit, small)
	default:
		return nil, errNoImage
	}
	if err != nil {
		return nil, err
	}
	a := &archive{}
	if a.config, err = img.ConfigFile(); err != nil {
		return nil, err
	}
	if a.layers, err = img.Layers(); err != nil {
		return nil, err
	}
	if a.id, err = img.ConfigName(); err != nil {
		return nil, err
	}
	return a, checkConfig(a.config, len(a.layers), "the archive")
}

// scanArchive lists the regular files of a tar file with their sizes.
func scanArchive(spool string) (map[string]int64, error) {
	f, err := os.Open(spool)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	sizes := map[string]int64{}
	for tr := tar.NewReader(f); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return sizes, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errArchive, err)
		}
		if h.Typeflag == tar.TypeReg {
			sizes[path.Clean(h.Name)] = h.Size
		}
		if len(sizes) > maxArchiveEntries {
			return nil, errNoImage
		}
	}
}

func openDockerSave(spool string, small func(string) error) (v1.Image, error) {
	opener := func() (io.ReadCloser, error) { return os.Open(spool) }
	m, err := tarball.LoadManifest(opener)
	if err != nil {
		return nil, err
	}
	if len(m) != 1 {
		var tags []string
		for _, d := range m {
			tags = append(tags, strings.Join(d.RepoTags, " "))
		}
		return nil, fault.New(fault.Invalid, "the archive holds %d images: %s", len(m), strings.Join(tags, ", ")).
			WithNext("Save one image at a time.")
	}
	if err := small(path.Clean(m[0].Config)); err != nil {
		return nil, err
	}
	return tarball.Image(opener, nil)
}

func openLayout(ctx context.Context, spool, dir string, limit int64, small func(string) error) (v1.Image, error) {
	if err := extractLayout(ctx, spool, dir, limit); err != nil {
		return nil, err
	}
	index, err := layout.ImageIndexFromPath(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errNoImage
	}
	if err != nil {
		return nil, err
	}
	check := func(h v1.Hash) error { return small("blobs/" + h.Algorithm + "/" + h.Hex) }
	img, err := pickPlatform(index, "the archive", check)
	if err != nil {
		return nil, err
	}
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	if err := checkManifest(m, "the archive"); err != nil {
		return nil, err
	}
	return img, check(m.Config.Digest)
}

// layoutEntry is all that is taken from an OCI layout: no name of it can lead
// anywhere else.
var layoutEntry = regexp.MustCompile(`^(oci-layout|index\.json|blobs/sha256/[0-9a-f]{64})$`)

func extractLayout(ctx context.Context, spool, dir string, limit int64) error {
	f, err := os.Open(spool)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := os.MkdirAll(filepath.Join(dir, "blobs", "sha256"), 0o700); err != nil {
		return err
	}
	tr := tar.NewReader(f)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: %w", errArchive, err)
		}
		name := path.Clean(h.Name)
		if h.Typeflag != tar.TypeReg || !layoutEntry.MatchString(name) {
			continue
		}
		if err := writeAll(ctx, filepath.Join(dir, filepath.FromSlash(name)), tr, limit); err != nil {
			return err
		}
	}
}
