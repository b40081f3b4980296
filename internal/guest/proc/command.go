package proc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/api/process"
	"github.com/agentiso/agentiso/internal/guest/identity"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// Limits of one command. Linux allows 128 KiB per string (MAX_ARG_STRLEN) and
// a quarter of the stack limit, 2 MiB of the usual 8, for all of them with a
// pointer each.
const (
	maxString    = 128<<10 - 1
	maxArguments = 2<<20 - 64<<10
	maxPath      = 4095 // PATH_MAX without the closing zero
	maxTag       = 256
)

// defaultPath is the PATH of a process when neither the identity nor the
// request has one.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// resolveLimit bounds the look-ups that a command needs: a file system of the
// guest may not answer (a dead FUSE or NFS server).
const resolveLimit = 10 * time.Second

// command is a request as it will be executed.
type command struct {
	user users.User
	name string // as requested
	argv []string
	env  []string
	dir  string
	// asked is true when the request names dir; false when dir is the
	// workspace's own or "".
	asked bool
	path  string // the program, absolute; set by resolve
	head  []byte // its first bytes, if the user may read them
}

// compose makes the command of a request. Errors are Connect errors.
func compose(cfg *process.ProcessConfig, u users.User, id identity.Snapshot, pty bool) (*command, error) {
	if err := checkConfig(cfg); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	c := &command{user: u, name: cfg.GetCmd(), argv: append([]string{cfg.GetCmd()}, cfg.GetArgs()...)}
	switch {
	case cfg.GetCwd() != "":
		c.dir, c.asked = u.Path(cfg.GetCwd()), true
	case id.Workdir != "":
		c.dir = u.Path(id.Workdir)
	}
	env := make(map[string]string, len(id.Env)+len(cfg.GetEnvs())+8)
	env["PATH"] = defaultPath
	if pty {
		env["TERM"] = "xterm-256color"
	}
	maps.Copy(env, id.Env)
	env["HOME"], env["USER"], env["LOGNAME"], env["SHELL"] = u.Home, u.Name, u.Name, u.Shell
	maps.Copy(env, cfg.GetEnvs())
	for _, k := range slices.Sorted(maps.Keys(env)) {
		c.env = append(c.env, k+"="+env[k])
	}
	size := 0
	for _, s := range slices.Concat(c.argv, c.env) {
		size += len(s) + 1 + 8
	}
	if size > maxArguments {
		return nil, connect.NewError(connect.CodeInvalidArgument,
			fmt.Errorf("arguments and environment take %d bytes, more than %d", size, maxArguments))
	}
	return c, nil
}

func checkConfig(cfg *process.ProcessConfig) error {
	if cfg.GetCmd() == "" {
		return errors.New("cmd is empty")
	}
	if err := checkString("cmd", cfg.GetCmd(), maxPath); err != nil {
		return err
	}
	for i, a := range cfg.GetArgs() {
		if err := checkString(fmt.Sprintf("args[%d]", i), a, maxString); err != nil {
			return err
		}
	}
	for k, v := range cfg.GetEnvs() {
		if k == "" || strings.ContainsRune(k, '=') {
			return fmt.Errorf("envs: %.64q is not a name", k)
		}
		if err := checkString(fmt.Sprintf("envs[%.64q]", k), k+"="+v, maxString); err != nil {
			return err
		}
	}
	return checkString("cwd", cfg.GetCwd(), maxPath)
}

func checkString(field, s string, limit int) error {
	if len(s) > limit {
		return fmt.Errorf("%s is %d bytes long, more than %d", field, len(s), limit)
	}
	if strings.ContainsRune(s, 0) {
		return fmt.Errorf("%s holds a zero byte", field)
	}
	return nil
}

// resolve finds the directory and the program as the user, within resolveLimit.
// The goroutine that looks may outlast it; release is called when it is over.
func (c *command) resolve(ctx context.Context, release func()) error {
	ctx, cancel := context.WithTimeout(ctx, resolveLimit)
	defer cancel()
	type result struct {
		found found
		err   error
	}
	done := make(chan result, 1)
	look := *c
	go func() {
		defer release()
		var r result
		defer func() {
			if v := recover(); v != nil {
				r.err = fmt.Errorf("look up %s: panic: %v", look.name, v)
			}
			done <- r
		}()
		r.err = look.user.Do(func() (err error) {
			r.found, err = look.find()
			return err
		})
	}()
	select {
	case r := <-done:
		c.dir, c.path, c.head = r.found.dir, r.found.path, r.found.head
		if r.err != nil && connect.CodeOf(r.err) == connect.CodeUnknown {
			return connect.NewError(connect.CodeInternal, r.err)
		}
		return r.err
	case <-ctx.Done():
		return connect.NewError(connect.CodeDeadlineExceeded,
			fmt.Errorf("look up %s: the file system did not answer: %w", c.name, ctx.Err()))
	}
}

type found struct {
	dir, path string
	head      []byte
}

// find is what resolve does as the user.
func (c *command) find() (f found, err error) {
	if f.dir = c.dir; f.dir != "" && !c.asked && errors.Is(checkDir(f.dir), fs.ErrPermission) {
		f.dir = "" // it is the default user's, and this is another
	}
	if f.dir == "" {
		// Like a login: a home that cannot be entered is no reason to fail.
		if f.dir = c.user.Path(""); checkDir(f.dir) != nil {
			f.dir = "/"
		}
	} else if err := checkDir(f.dir); err != nil {
		code := connect.CodeInvalidArgument
		if errors.Is(err, fs.ErrPermission) {
			code = connect.CodePermissionDenied
		}
		return f, connect.NewError(code, fmt.Errorf("cwd %q: %w", f.dir, err))
	}
	if f.path, err = c.lookPath(f.dir); err != nil {
		return f, err
	}
	f.head = readHead(f.path)
	return f, nil
}

// checkDir tells whether the calling thread's user may enter dir. The text of
// its error is for users.
func checkDir(dir string) error {
	st, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errors.New("no such directory")
	case errors.Is(err, fs.ErrPermission):
		return fs.ErrPermission
	case err != nil:
		return underlying(err)
	case !st.IsDir():
		return errors.New("not a directory")
	}
	if err := unix.Faccessat(unix.AT_FDCWD, dir, unix.X_OK, unix.AT_EACCESS); err != nil {
		return underlying(err)
	}
	return nil
}

// lookPath finds the program as execvp(3) does, with the process's own PATH
// and directory and the calling thread's permissions.
func (c *command) lookPath(dir string) (string, error) {
	if strings.Contains(c.name, "/") {
		p := c.name
		if !path.IsAbs(p) {
			p = path.Join(dir, p)
		}
		return p, c.lookError(checkProgram(p))
	}
	var denied error
	for _, d := range strings.Split(c.getenv("PATH"), ":") {
		if !path.IsAbs(d) {
			d = path.Join(dir, d)
		}
		p := path.Join(d, c.name)
		err := checkProgram(p)
		if err == nil {
			return p, nil
		}
		if errors.Is(err, fs.ErrPermission) && denied == nil {
			if _, serr := os.Stat(p); serr == nil {
				denied = err
			}
		}
	}
	if denied != nil {
		return "", c.lookError(denied)
	}
	return "", c.lookError(fs.ErrNotExist)
}

func (c *command) getenv(key string) string {
	for _, kv := range c.env {
		if v, ok := strings.CutPrefix(kv, key+"="); ok {
			return v
		}
	}
	return ""
}

// checkProgram tells whether the calling thread's user may execute p.
func checkProgram(p string) error {
	st, err := os.Stat(p)
	if err != nil {
		return underlying(err)
	}
	if st.IsDir() {
		return unix.EISDIR
	}
	if !st.Mode().IsRegular() {
		return fs.ErrPermission
	}
	if err := unix.Faccessat(unix.AT_FDCWD, p, unix.X_OK, unix.AT_EACCESS); err != nil {
		return underlying(err)
	}
	return nil
}

// lookError words the failure to find the program.
func (c *command) lookError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		where := ""
		if !strings.Contains(c.name, "/") {
			where = " in PATH " + c.getenv("PATH")
		}
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("%s: executable file not found%s", c.name, where))
	case errors.Is(err, fs.ErrPermission):
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("%s: permission denied for user %s", c.name, c.user.Name))
	case errors.Is(err, unix.EISDIR):
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%s: is a directory", c.name))
	default:
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%s: %w", c.name, err))
	}
}

// execError words the failure to execute what resolve found.
func (c *command) execError(err error) error {
	switch {
	case errors.Is(err, unix.ENOENT):
		msg := fmt.Errorf("%s: it exists, but its dynamic loader or something else that it needs does not", c.path)
		if line, ok := bytes.CutPrefix(c.head, []byte("#!")); ok {
			line, _, _ = bytes.Cut(line, []byte("\n"))
			msg = fmt.Errorf("%s: its interpreter %.128q: executable file not found", c.path, bytes.TrimSpace(line))
		}
		return connect.NewError(connect.CodeNotFound, msg)
	case errors.Is(err, fs.ErrPermission):
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("%s: permission denied for user %s", c.path, c.user.Name))
	case errors.Is(err, unix.ENOEXEC):
		return connect.NewError(connect.CodeInvalidArgument,
			fmt.Errorf("%s: not a program for this machine, nor a script with a #! line", c.path))
	case errors.Is(err, unix.E2BIG):
		return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%s: argument list too long", c.path))
	case errors.Is(err, unix.ETXTBSY):
		return connect.NewError(connect.CodeFailedPrecondition, fmt.Errorf("%s: it is being written to", c.path))
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return connect.NewError(connect.CodeResourceExhausted, fmt.Errorf("start %s: %w", c.path, underlying(err)))
	default:
		return connect.NewError(connect.CodeInternal, fmt.Errorf("start %s: %w", c.path, underlying(err)))
	}
}

// readHead returns the first bytes of a program, if it can be read. A file
// system that does not answer is met here, in resolve, and not in the fork,
// which every other start would have to wait for.
func readHead(p string) []byte {
	f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	b := make([]byte, 256)
	n, _ := io.ReadFull(f, b)
	return b[:n]
}

// underlying strips the path and operation that os puts around an error.
func underlying(err error) error {
	if p, ok := errors.AsType[*fs.PathError](err); ok {
		return p.Err
	}
	return err
}
