package files

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"

	"github.com/agentiso/agentiso/internal/guest/access"
)

// Bounds of one composition.
const (
	maxComposeBody    = 4 << 20
	maxComposeSources = 10_000
)

type composition struct {
	Sources     []string `json:"source_paths"`
	Destination string   `json:"destination"`
	Username    string   `json:"username"`
}

// compose answers POST /files/compose: the sources in order become the
// destination, and are removed. The destination appears by a rename, so that it
// and the sources are untouched when anything fails before.
func (s *Service) compose(w http.ResponseWriter, r *http.Request) {
	res, err := s.doCompose(w, r)
	if err != nil {
		s.reply(w, r, err)
		return
	}
	answer(w, http.StatusOK, res)
}

func (s *Service) doCompose(w http.ResponseWriter, r *http.Request) (written, error) {
	var c composition
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxComposeBody)).Decode(&c); err != nil {
		return written{}, invalidf("the body is not valid: %v", err)
	}
	name := c.Username
	if name == "" {
		var err error
		if name, err = access.User(r); err != nil {
			return written{}, unauthorizedf("%v", err)
		}
	}
	u, err := s.user(name)
	if err != nil {
		return written{}, err
	}
	if len(c.Sources) == 0 || len(c.Sources) > maxComposeSources {
		return written{}, invalidf("source_paths must name 1 to %d files", maxComposeSources)
	}
	dst, err := resolveFile(u, c.Destination)
	if err != nil {
		return written{}, fmt.Errorf("destination: %w", err)
	}
	sources := make([]string, len(c.Sources))
	seen := map[string]bool{dst: true}
	for i, p := range c.Sources {
		if sources[i], err = resolveFile(u, p); err != nil {
			return written{}, err
		}
		if seen[sources[i]] {
			return written{}, invalidf("'%s' is named twice", valid(sources[i]))
		}
		seen[sources[i]] = true
	}
	err = u.Do(func() error {
		if err := concatenate(r.Context(), sources, dst); err != nil {
			return spaceError(err, dst)
		}
		for _, p := range sources {
			if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("'%s' is complete, but a source was not removed: %w", dst, err)
			}
		}
		return nil
	})
	if err != nil {
		return written{}, err
	}
	return writtenTo(dst, nil), nil
}

// concatenate makes dst of the sources. After an error dst is as it was.
func concatenate(ctx context.Context, sources []string, dst string) (err error) {
	// A link at the destination stays; what it leads to is replaced.
	if p, err := filepath.EvalSymlinks(dst); err == nil {
		dst = p
	}
	mode := fs.FileMode(fileMode)
	old, err := os.Stat(dst)
	if err == nil {
		if !old.Mode().IsRegular() {
			return invalidf("path '%s' is %s", valid(dst), kind(old.Mode()))
		}
		mode = old.Mode().Perm()
	}
	// Every source is looked at before anything is written.
	for _, p := range sources {
		fi, err := statRegular(p)
		if err != nil {
			return err
		}
		if old != nil && os.SameFile(old, fi) {
			return invalidf("'%s' is a source and the destination", valid(p))
		}
	}
	if err := os.MkdirAll(path.Dir(dst), dirMode); err != nil {
		return err
	}
	temp := tempName(dst)
	out, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(temp)
		}
	}()
	for _, p := range sources {
		if err = appendPath(ctx, out, p); err != nil {
			break
		}
	}
	if old != nil && err == nil {
		// The umask must not narrow a mode that was there.
		err = out.Chmod(mode)
	}
	if err = errors.Join(err, out.Close()); err != nil {
		return err
	}
	return os.Rename(temp, dst)
}

func appendPath(ctx context.Context, out *os.File, p string) error {
	in, _, err := openRegular(p)
	if err != nil {
		return err
	}
	defer in.Close()
	return appendFile(ctx, out, in)
}
