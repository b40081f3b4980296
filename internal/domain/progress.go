package domain

// Progress tells how far something long has come. Total is 0 while unknown;
// Unit is "bytes" or "" for steps; Log is a line of a tool's output.
type Progress struct {
	Stage string
	Done  int64
	Total int64
	Unit  string
	Log   string
}

// ProgressFunc receives progress; it must not block and may be nil.
type ProgressFunc func(Progress)

// Report calls f unless it is nil.
func (f ProgressFunc) Report(p Progress) {
	if f != nil {
		f(p)
	}
}

// PullOptions say which OCI image to fetch and how.
type PullOptions struct {
	Reference string
	Name      string // "" is the reference's repository and tag
	Insecure  bool   // plain HTTP; loopback registries need no asking
	Auth      RegistryAuth
}

// RegistryAuth is one registry's credentials as Docker's configuration has
// them; the zero value is anonymous.
type RegistryAuth struct {
	Username      string
	Password      string
	IdentityToken string
	RegistryToken string
}
