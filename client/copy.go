package client

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// CopyOptions say how to copy.
type CopyOptions struct {
	User string // inside the workspace; "": its default
	// Progress, when set, is told how many bytes of file contents have passed,
	// and how many there are in all (0: unknown). It must not block.
	Progress func(done, total int64)
}

// Copied says what a copy did.
type Copied struct {
	Files int64
	Bytes int64
	// Skipped are sockets, FIFOs and devices, which are not copied; the first
	// hundred of them.
	Skipped []string
}

const maxSkipped = 100

func (r *Copied) skip(name string) {
	if len(r.Skipped) < maxSkipped {
		r.Skipped = append(r.Skipped, name)
	}
}

// CopyTo copies the local file or directory to remote inside a workspace, with
// modes and modification times. Names mean what they mean to `docker cp`:
//
//	a file to a directory, or to a name with a final slash: into it
//	a file to anything else: to that name
//	a directory to a directory: into it, under its own name
//	a directory to what does not exist: to that name
//	DIR/. to a directory: its contents into it
//
// Missing parents are made. A symbolic link given as local is followed; those
// below a directory are copied as links. What was copied before an error
// stays.
func (c *Client) CopyTo(ctx context.Context, ref, local, remote string, o CopyOptions) (Copied, error) {
	var r Copied
	st, err := os.Stat(local)
	if err != nil {
		return r, localError(err)
	}
	if !st.IsDir() && !st.Mode().IsRegular() {
		return r, invalid("Copy a file or a directory, or use - for standard input.", "%s is neither a file nor a directory", local)
	}
	there, err := c.Stat(ctx, ref, remote, o.User)
	if err != nil && KindOf(err) != NotFound {
		return r, err
	}
	if err != nil && !err.(*Error).Guest { //nolint:errorlint,forcetypeassert // KindOf found one
		return r, err // the workspace is what was not found
	}
	dir, name, err := uploadTarget(st.IsDir(), local, remote, there)
	if err != nil {
		return r, err
	}
	p := &packer{result: &r, progress: o.Progress}
	if o.Progress != nil {
		p.total = sizeOf(local)
	}
	pr, pw := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := p.pack(pw, local, name)
		_ = pw.CloseWithError(err)
		packed <- err
	}()
	err = c.WriteArchive(ctx, ref, dir, o.User, pr)
	_ = pr.CloseWithError(errUploadEnded)
	perr := <-packed
	if perr != nil && !errors.Is(perr, errUploadEnded) {
		return r, localError(perr) // it is the cause of whatever the other side says
	}
	return r, err
}

var errUploadEnded = errors.New("the upload ended")

// uploadTarget says which directory to unpack in and what to call the copy
// there; "" means that its contents go into that directory.
func uploadTarget(isDir bool, local, remote string, there *FileInfo) (dir, name string, err error) {
	base, err := baseOf(local)
	if err != nil {
		return "", "", localError(err)
	}
	intoDir := there != nil && there.Type == TypeDirectory
	switch {
	case there != nil && !intoDir && (isDir || strings.HasSuffix(remote, "/")):
		return "", "", invalid("Name a directory, or a name that does not exist.", "%s in the workspace is not a directory", remote)
	case isDir && (!intoDir || contentsOnly(local)):
		return remote, "", nil
	case intoDir || strings.HasSuffix(remote, "/"):
		return remote, base, nil
	case there != nil && there.SymlinkTarget != "" && there.Type == TypeFile:
		remote = there.SymlinkTarget // write through it, as cp does
	}
	return path.Dir(remote), path.Base(remote), nil
}

// contentsOnly reports whether p asks for what is in a directory.
func contentsOnly(p string) bool { return p == "." || strings.HasSuffix(p, "/.") }

// baseOf is the name of a local file, also of "." and "..".
func baseOf(p string) (string, error) {
	abs, err := filepath.Abs(p)
	return filepath.Base(abs), err
}

// CopyFrom copies the file or directory remote of a workspace to the local
// path, by the same rules as CopyTo with the sides exchanged. Set-user-id and
// similar bits are dropped, owners are the caller's, and nothing that the guest
// sends can make it write outside of the copy. What was copied before an error
// stays, but for the file that it struck.
func (c *Client) CopyFrom(ctx context.Context, ref, remote, local string, o CopyOptions) (Copied, error) {
	var r Copied
	there, err := c.Stat(ctx, ref, remote, o.User)
	if err != nil {
		return r, err
	}
	source := remote
	if there.SymlinkTarget != "" && there.Type != TypeSymlink {
		source = there.SymlinkTarget
	}
	isDir := there.Type == TypeDirectory
	if !isDir && there.Type != TypeFile {
		return r, invalid("Copy a file or a directory.", "%s in the workspace is neither a file nor a directory", remote)
	}
	dir, name, err := downloadTarget(isDir, remote, local, there.Name)
	if err != nil {
		return r, err
	}
	stream, err := c.ReadArchive(ctx, ref, source, o.User)
	if err != nil {
		return r, err
	}
	defer stream.Close()
	u := &unpacker{result: &r, progress: o.Progress, single: name}
	if !isDir {
		u.total = there.Size
	}
	_, err = os.Stat(dir)
	u.made = errors.Is(err, fs.ErrNotExist)
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return r, localError(err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return r, localError(err)
	}
	defer root.Close()
	u.root, u.dir = root, dir
	return r, u.unpack(stream)
}

// downloadTarget says in which local directory the copy goes, and for a file
// under which name; for a directory name is "".
func downloadTarget(isDir bool, remote, local, base string) (dir, name string, err error) {
	if base == "" || base == "." || base == ".." || strings.ContainsRune(base, '/') {
		return "", "", &Error{Kind: Invalid, Message: "the agent calls the file to copy by an impossible name", Guest: true, Next: "Destroy the workspace: its agent does not keep to the protocol."}
	}
	st, err := os.Stat(local)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", "", localError(err)
	}
	intoDir := err == nil && st.IsDir()
	switch {
	case err == nil && !intoDir && (isDir || strings.HasSuffix(local, "/")):
		return "", "", invalid("Name a directory, or a name that does not exist.", "%s is not a directory", local)
	case isDir && (!intoDir || contentsOnly(remote)):
		return local, "", nil
	case isDir && base == "/":
		return local, "", nil
	case isDir:
		return filepath.Join(local, base), "", nil
	case intoDir || strings.HasSuffix(local, "/"):
		return local, base, nil
	}
	if err == nil { // write through a link, as cp does
		if target, rerr := filepath.EvalSymlinks(local); rerr == nil {
			local = target
		}
	}
	return filepath.Dir(local), filepath.Base(local), nil
}

// localError names an error of this side of a copy.
func localError(err error) error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	k := Internal
	next := ""
	switch {
	case errors.Is(err, fs.ErrNotExist):
		k, next = NotFound, "Check the path on this host."
	case errors.Is(err, fs.ErrPermission):
		k, next = Unauthorized, "Copy as a user who may do that on this host."
	case errors.Is(err, errNoSpace):
		k, next = NoSpace, "Free some space on this host."
	}
	return &Error{Kind: k, Message: "on this host: " + err.Error(), Next: next, Err: err}
}

// tally counts contents as they pass.
type tally struct {
	r        io.Reader
	result   *Copied
	total    int64
	progress func(done, total int64)
}

func (t *tally) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	t.result.Bytes += int64(n)
	if t.progress != nil && n > 0 {
		t.progress(t.result.Bytes, t.total)
	}
	return n, err
}

// copyBlock is how much of a file's contents moves at a time.
const copyBlock = 256 << 10

// regular reports what a tar entry of contents is.
func regular(h *tar.Header) bool { return h.Typeflag == tar.TypeReg }
