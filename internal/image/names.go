package image

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/agentiso/agentiso/internal/fault"
)

const digestPrefix = "sha256:"

// nameRE takes what registries' references look like, short names, and nothing
// that a path or an option could be mistaken for.
var nameRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._:@-]*(/[A-Za-z0-9][A-Za-z0-9._:@-]*)*$`)

func checkName(name string) error {
	if !nameRE.MatchString(name) || strings.HasPrefix(name, digestPrefix) || len(fileName(name)) > 255 {
		return fault.New(fault.Invalid, "%q cannot be an image's name", name).
			WithNext("Use letters, digits and . _ : @ - /, beginning with a letter or digit, 255 at the most.")
	}
	return nil
}

// fileName is the name of the file that holds name's digest.
func fileName(name string) string { return strings.ReplaceAll(url.PathEscape(name), "/", "%2F") }

// names reads all names and the digests they stand for, whether or not these
// exist.
func (s *Store) names() (map[string]string, error) {
	entries, err := os.ReadDir(s.path("names"))
	if err != nil {
		return nil, err
	}
	names := make(map[string]string, len(entries))
	for _, e := range entries {
		name, err := url.PathUnescape(e.Name())
		if err != nil || fileName(name) != e.Name() || checkName(name) != nil {
			continue
		}
		text, err := os.ReadFile(s.path("names", e.Name()))
		if err != nil { // removed since ReadDir
			continue
		}
		if digest := strings.TrimSpace(string(text)); validDigest(digest) {
			names[name] = digest
		}
	}
	return names, nil
}

// setName makes name stand for digest; it is durable when it returns.
func (s *Store) setName(name, digest string) error {
	f, err := os.CreateTemp(s.path("names"), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // it has usually been renamed
	_, err = fmt.Fprintln(f, digest)
	if err == nil {
		err = f.Chmod(0o644)
	}
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = os.Rename(f.Name(), s.path("names", fileName(name)))
	}
	if err == nil {
		err = syncDir(s.path("names"))
	}
	if err != nil {
		return fmt.Errorf("name image %s: %w", name, err)
	}
	return nil
}

func (s *Store) removeName(name string) error {
	if err := os.Remove(s.path("names", fileName(name))); err != nil && !os.IsNotExist(err) {
		return err
	}
	return syncDir(s.path("names"))
}

func validDigest(d string) bool {
	hex, ok := strings.CutPrefix(d, digestPrefix)
	return ok && len(hex) == 64 && isHex(hex)
}

func isHex(s string) bool {
	return s != "" && strings.Trim(s, "0123456789abcdef") == ""
}

func dirName(digest string) string { return strings.Replace(digest, ":", "-", 1) }

func syncDir(dir string) error {
	d, err := os.Open(filepath.Clean(dir))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
