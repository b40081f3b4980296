package client

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"time"

	"connectrpc.com/connect"

	"github.com/agentiso/agentiso/api/filesystem"
)

// FileInfo describes a file inside a workspace.
type FileInfo struct {
	Name string // base name
	Path string // absolute
	// Type, Size, Mode and ModTime are those of what a symbolic link leads to.
	Type          FileType
	Size          int64
	Mode          uint32 // permission bits
	Owner, Group  string
	ModTime       time.Time
	SymlinkTarget string // resolved; "" when it is no symbolic link
}

// FileType is what kind of file it is.
type FileType string

// The types.
const (
	TypeFile      FileType = "file"
	TypeDirectory FileType = "directory"
	TypeSymlink   FileType = "symlink" // one that leads nowhere
	TypeSpecial   FileType = "special"
)

var fileTypes = map[filesystem.FileType]FileType{
	filesystem.FileType_FILE_TYPE_UNSPECIFIED: TypeSpecial,
	filesystem.FileType_FILE_TYPE_FILE:        TypeFile,
	filesystem.FileType_FILE_TYPE_DIRECTORY:   TypeDirectory,
	filesystem.FileType_FILE_TYPE_SYMLINK:     TypeSymlink,
}

// Stat describes the file at path inside a workspace. Relative paths and "~"
// begin at the user's home; user "" is the workspace's default.
func (c *Client) Stat(ctx context.Context, ref, path, user string) (*FileInfo, error) {
	req := connect.NewRequest(&filesystem.StatRequest{Path: path})
	asUser(req.Header(), user)
	res, err := c.filesystem(ref).Stat(ctx, req)
	if err != nil {
		return nil, c.failed(ctx, "looking at "+ref+":"+path, err)
	}
	e := res.Msg.GetEntry()
	return &FileInfo{
		Name: e.GetName(), Path: e.GetPath(), Type: fileTypes[e.GetType()], Size: e.GetSize(), Mode: e.GetMode(),
		Owner: e.GetOwner(), Group: e.GetGroup(), ModTime: moment(e.GetModifiedTime()), SymlinkTarget: e.GetSymlinkTarget(),
	}, nil
}

// ReadFile opens a file inside a workspace; size is -1 when it is not known.
// The caller closes it.
func (c *Client) ReadFile(ctx context.Context, ref, path, user string) (r io.ReadCloser, size int64, err error) {
	res, err := c.agentCall(ctx, http.MethodGet, ref, "/files", path, user, nil) //nolint:bodyclose // the caller's to close
	if err != nil {
		return nil, 0, err
	}
	return &body{ReadCloser: res.Body, c: c, ctx: ctx, doing: "reading " + ref + ":" + path}, res.ContentLength, nil
}

// WriteFile writes r to a file inside a workspace, making its directory when
// it is missing. A file that is there is overwritten and keeps its mode.
func (c *Client) WriteFile(ctx context.Context, ref, path, user string, r io.Reader) error {
	res, err := c.agentCall(ctx, http.MethodPost, ref, "/files", path, user, upload{"application/octet-stream", r})
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// ReadArchive opens a tar stream of the file or directory at path inside a
// workspace: the entries of a directory are relative to it, "./" first. The
// caller closes it. The stream ends with an error, and not with io.EOF, when
// it is not whole.
func (c *Client) ReadArchive(ctx context.Context, ref, path, user string) (io.ReadCloser, error) {
	res, err := c.agentCall(ctx, http.MethodGet, ref, "/files/archive", path, user, nil) //nolint:bodyclose // the caller's to close
	if err != nil {
		return nil, err
	}
	return &body{ReadCloser: res.Body, c: c, ctx: ctx, doing: "reading " + ref + ":" + path, res: res}, nil
}

// WriteArchive unpacks a tar stream into the directory dir inside a workspace,
// which is made when it is missing. Entries belong to the user that it is
// unpacked as; to their numeric owners when that is root. What was unpacked
// before an error stays.
func (c *Client) WriteArchive(ctx context.Context, ref, dir, user string, tar io.Reader) error {
	res, err := c.agentCall(ctx, http.MethodPost, ref, "/files/archive", dir, user, upload{"application/x-tar", tar})
	if err != nil {
		return err
	}
	return res.Body.Close()
}

// upload is the body of a call.
type upload struct {
	contentType string
	r           io.Reader
}

// agentCall makes one of the agent's plain HTTP calls; the response is 2xx.
func (c *Client) agentCall(ctx context.Context, method, ref, call, path, user string, up any) (*http.Response, error) {
	doing := map[string]string{http.MethodGet: "reading ", http.MethodPost: "writing "}[method] + ref + ":" + path
	q := url.Values{"path": {path}}
	if user != "" {
		q.Set("username", user)
	}
	var r io.Reader
	u, hasBody := up.(upload)
	if hasBody {
		r = struct{ io.Reader }{u.r} // keeps net/http from closing what is the caller's
	}
	req, err := http.NewRequestWithContext(ctx, method, agentURL(ref)+call+"?"+q.Encode(), r)
	if err != nil {
		return nil, c.failed(ctx, doing, err)
	}
	if hasBody {
		req.Header.Set("Content-Type", u.contentType)
	}
	asUser(req.Header, user)
	res, err := c.http.Do(req)
	if err != nil {
		return nil, c.failed(ctx, doing, err)
	}
	if res.StatusCode/100 != 2 {
		defer res.Body.Close()
		return nil, fromHTTP(doing, res)
	}
	return res, nil
}

// trailerError is the trailer in which an agent says why an archive ends early.
const trailerError = "X-Agentiso-Error"

// body words the errors of a response's body, and reads its trailer.
type body struct {
	io.ReadCloser
	c     *Client
	ctx   context.Context // the request's own
	doing string
	res   *http.Response // with a trailer to read; else nil
}

func (b *body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	switch {
	case err == nil:
		return n, nil
	case err != io.EOF:
		return n, b.c.failed(b.ctx, b.doing, err)
	case b.res != nil:
		if why := b.res.Trailer.Get(trailerError); why != "" {
			return n, &Error{Kind: Internal, Message: b.doing + ": " + why, Guest: true, Next: "What was copied so far is not whole."}
		}
	}
	return n, err
}
