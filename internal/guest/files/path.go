package files

import (
	"path"
	"strings"

	"github.com/agentiso/agentiso/internal/guest/users"
)

// maxPath is PATH_MAX of Linux without the final NUL. A name between slashes
// has at most maxName bytes.
const (
	maxPath = 4095
	maxName = 255
)

// resolve is p as u means it: absolute and clean. What no file can be called is
// refused here, so that the error does not depend on the file system.
func resolve(u users.User, p string) (string, error) {
	if strings.IndexByte(p, 0) >= 0 {
		return "", invalidf("path contains a NUL byte")
	}
	if len(p) > maxPath {
		return "", invalidf("path is longer than %d bytes", maxPath)
	}
	p = u.Path(p)
	if len(p) > maxPath {
		return "", invalidf("path is longer than %d bytes", maxPath)
	}
	for name := range strings.SplitSeq(p, "/") {
		if len(name) > maxName {
			return "", invalidf("path has a name longer than %d bytes", maxName)
		}
	}
	return p, nil
}

// resolveFile is resolve for a path that names a file: not "", not "/", and
// without a slash at its end.
func resolveFile(u users.User, p string) (string, error) {
	if p == "" {
		return "", invalidf("path is required")
	}
	if strings.HasSuffix(p, "/") {
		return "", invalidf("path '%s' names a directory", valid(p))
	}
	return resolve(u, p)
}

// under says whether p is dir or below it; both are clean.
func under(p, dir string) bool {
	return p == dir || dir == "/" || strings.HasPrefix(p, dir+"/")
}

func join(dir, name string) string { return path.Join(dir, name) }
